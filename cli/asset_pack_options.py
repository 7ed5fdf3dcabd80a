"""Options of an asset pack and of the draft pair, for commands that make a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import note
from .parameters import PATH, refuse_given

if TYPE_CHECKING:
    from mlx_afm.formats.draft_pair import DraftPair

_PACK = [
    click.option(
        "--asset-pack", is_flag=True, help="Write NAME.manifest.json and print the xcrun command that makes the pack."
    ),
    click.option(
        "--platforms", metavar="LIST", help="Platforms of the asset pack: some of iOS,macOS,visionOS.  [default: all]"
    ),
    click.option("--download-policy", metavar="NAME", help="ON_DEMAND, PREFETCH or ESSENTIAL.  [default: ON_DEMAND]"),
    click.option(
        "--installation-event-type",
        metavar="LIST",
        help="For PREFETCH and ESSENTIAL: FIRST_INSTALLTION (Apple's spelling), SUBSEQUENT_UPDATE.  [default: both]",
    ),
]
_DRAFT = [
    click.option("--draft-checkpoint", type=PATH, help="With --toolkit: draft .pt, for speculative decoding."),
    click.option(
        "--ignore-surplus", is_flag=True, help="Leave out draft tensors that the toolkit's specification does not name."
    ),
]


def with_pack_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command takes them as `**options` and hands these on."""
    for option in reversed([*_DRAFT, *_PACK]):
        function = option(function)
    return function


def names_of(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def pack_settings(options: dict[str, Any]) -> dict[str, Any] | None:
    """Takes the pack's options out; None if no pack is wanted.

    Raises:
        click.UsageError: options of a pack without --asset-pack.
    """
    platforms, policy, events = (
        options.pop(name) for name in ("platforms", "download_policy", "installation_event_type")
    )
    if not options.pop("asset_pack"):
        if platforms or policy or events:
            raise click.UsageError("--platforms, --download-policy and --installation-event-type need --asset-pack")
        return None
    given = {"platforms": names_of(platforms), "policy": policy and policy.upper(), "events": names_of(events)}
    return {name: value for name, value in given.items() if value}


def require_pack(settings: dict[str, Any] | None) -> None:
    """Checks a pack's settings before anything is written.

    Raises:
        ConfigError: see `AssetPack`.
    """
    from mlx_afm.formats.asset_pack import AssetPack

    if settings is not None:
        AssetPack(package=Path("asset pack"), identifier="", **settings)


def make_pack(package: Path, identifier: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Writes the manifest and says the command; what `--json` tells of it."""
    from mlx_afm.formats.asset_pack import AssetPack

    if settings is None:
        return {}
    pack = AssetPack(package=package, identifier=identifier, **settings)
    manifest = pack.write_manifest()
    note(f"wrote {manifest}")
    note(f"on a Mac with Xcode, to make the pack {identifier}:\n  {pack.command_line()}")
    return {"asset_pack": {"id": identifier, "manifest": str(manifest), "command": pack.command_line()}}


def open_draft(options: dict[str, Any]) -> DraftPair | None:
    """Takes the draft's options out; the draft pair, or None if none is wanted.

    Raises:
        click.UsageError: a draft without --toolkit. FormatError: see `open_draft_pair`.
    """
    checkpoint, ignore_surplus = options.pop("draft_checkpoint"), options.pop("ignore_surplus")
    if checkpoint is None:
        refuse_given(("ignore_surplus",), "without --draft-checkpoint")
        return None
    if options.get("toolkit") is None:
        raise click.UsageError("--draft-checkpoint needs --toolkit: the draft pair is made from the toolkit's assets")
    from mlx_afm.workflows.draft_pair import open_draft_pair

    draft = open_draft_pair(options["toolkit"], checkpoint, ignore_surplus=ignore_surplus)
    if draft.surplus:
        note(f"draft tensors left out: {', '.join(draft.surplus)}")
    return draft
