"""`export.export_fmadapter` and `export.produce_asset_pack` of Apple's toolkit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_afm.checkpoints.toolkit import find_toolkit_files
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import read_json, to_optional_path, to_path
from mlx_afm.folders import OnNote, ignore_note
from mlx_afm.formats.asset_pack import AssetPack
from mlx_afm.formats.fmadapter import METADATA_FILE, no_files
from mlx_afm.formats.fmadapter_metadata import read_metadata
from mlx_afm.model import AFMConfig, parse_toolkit_config
from mlx_afm.workflows.draft_pair import open_draft_pair
from mlx_afm.workflows.export import ExportConfig, Exported, export_package
from mlx_afm.workflows.toolkit import find_assets, model_folder


def export_checkpoint(
    config: ExportConfig,
    assets: str | Path | None,
    *,
    draft_checkpoint: str | Path | None = None,
    on_note: OnNote = ignore_note,
) -> Exported:
    """Makes a package of a toolkit checkpoint, with the draft pair if there is a draft checkpoint.

    Args:
        config: what to make; model and toolkit are filled in here.
        assets: see `find_assets`; without any, only checkpoints for Apple's own sizes can be told.
        draft_checkpoint: needs assets. Tensors that the toolkit's spec does not name are left out, as there.
        on_note: told of what is replaced or left out.

    Raises:
        ConfigError, AdapterError, FormatError: see `export_package` and `open_draft_pair`.
    """
    assets = to_optional_path(assets)
    draft_checkpoint = to_optional_path(draft_checkpoint)
    place = _assets_or_none(assets, draft_checkpoint)
    if place is not None:
        has_signature = (place / "export").is_dir() or (place.absolute().parent / "export").is_dir()
        config = replace(config, model=_model(place, on_note), toolkit=place.absolute() if has_signature else None)
    add_files = no_files
    if draft_checkpoint is not None and place is not None:
        draft = open_draft_pair(place, draft_checkpoint, ignore_surplus=True)
        if draft.surplus:
            on_note(f"draft tensors left out: {', '.join(draft.surplus)}")
        add_files = draft.write
    target = config.output_dir / f"{config.name}.fmadapter"
    if target.exists():
        on_note(f"replacing {target}")
    return export_package(config, add_files)


def _assets_or_none(given: Path | None, draft_checkpoint: Path | None) -> Path | None:
    try:
        return find_assets(given)
    except ConfigError:
        if given is not None or draft_checkpoint is not None:
            raise
        return None


def _model(assets: Path, on_note: OnNote) -> Path | None:
    """A model folder where sizes are not Apple's, which a checkpoint does not tell; else none is needed."""
    try:
        files = find_toolkit_files(assets)
    except FormatError:
        return None
    config = parse_toolkit_config(read_json(files.config), where=files.config)
    return None if config.model == AFMConfig() else model_folder(assets, "bf16-mixed", on_note=on_note)


def asset_pack_of(
    package: str | Path, *, platforms: tuple[str, ...] = (), policy: str | None = None, events: tuple[str, ...] = ()
) -> AssetPack:
    """The pack of a package; what is not given has `AssetPack`'s defaults.

    Raises:
        FormatError: no package. ConfigError: see `AssetPack`.
    """
    package = to_path(package)
    if not package.is_dir():
        raise FormatError("no such package", where=package, expected="a .fmadapter folder")
    metadata, _ = read_metadata(package / METADATA_FILE)
    given: dict[str, Any] = {"platforms": platforms, "policy": policy, "events": events}
    settings = {name: value for name, value in given.items() if value}
    return AssetPack(package=package.absolute(), identifier=metadata.identifier, **settings)


def produce_pack(pack: AssetPack, output: str | Path) -> Path:
    """Runs Apple's packaging command; returns the archive.

    Raises:
        ConfigError: no Xcode here, or the command failed; with the command.
    """
    output = to_path(output)
    archive = output if output.suffix == ".aar" else output / pack.archive.name
    archive = archive.absolute()
    if shutil.which("xcrun") is None:
        advice = f"On a Mac with Xcode: {pack.command_line(archive)}"
        raise ConfigError("asset packs are made by Xcode's ba-package, which is not here", advice=advice)
    done = subprocess.run(pack.command(archive), check=False)
    if done.returncode:
        advice = f"The command was: {pack.command_line(archive)}"
        raise ConfigError("ba-package failed", found=f"exit code {done.returncode}", advice=advice)
    return archive
