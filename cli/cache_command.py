"""`mlx-afm cache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mlx_afm.files import format_bytes, to_json

from .output import json_option
from .parameters import example

if TYPE_CHECKING:
    from mlx_afm.workflows.cache import CacheEntry


@click.group("cache", epilog=example("mlx-afm cache list"))
def command() -> None:
    """What is kept on disk to save time: encoded data, activations of frozen layers."""


@command.command("list", epilog=example("mlx-afm cache list --json"))
@json_option
def list_entries(as_json: bool) -> None:
    """List what is kept, the largest first.

    The folder is $MLX_AFM_CACHE, or mlx-afm in your cache folder.
    """
    from mlx_afm.data.read import cache_folder
    from mlx_afm.workflows.cache import list_cache

    _show(str(cache_folder()), list_cache(), as_json)


@command.command("clear", epilog=example("mlx-afm cache clear --older-than 7"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--older-than", type=click.FloatRange(min=0), default=0.0, help="Only what was not used for so many days."
)
@json_option
def clear(names: tuple[str, ...], older_than: float, as_json: bool) -> None:
    """Delete what is kept: the entries NAME, or all. No result is lost; what is needed again is computed again."""
    from mlx_afm.data.read import cache_folder
    from mlx_afm.workflows.cache import clear_cache

    _show(str(cache_folder()), clear_cache(names, older_than), as_json)


def _show(folder: str, entries: Sequence[CacheEntry], as_json: bool) -> None:
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        rows = [
            {"name": e.name, "kind": e.kind, "bytes": e.size_bytes, "days": round(e.days, 3), "about": e.about}
            for e in entries
        ]
        click.echo(to_json({"folder": folder, "bytes": total, "entries": rows}))
        return
    click.echo(f"{folder}: {len(entries)} entries, {format_bytes(total)}")
    for e in entries:
        click.echo(f"{e.name[:12]}  {e.kind:<18}  {format_bytes(e.size_bytes):>9}  {e.days:5.1f} days  {e.about}")
