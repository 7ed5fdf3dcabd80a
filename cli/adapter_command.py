"""`mlx-afm adapter`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, note, show
from .parameters import PATH, example, refuse_given


@click.group("adapter", epilog=example("mlx-afm adapter convert my-adapter titles.pt"))
def command() -> None:
    """Adapters and their three forms: MLX folder, toolkit .pt, .fmadapter."""


@command.command("convert", epilog=example("mlx-afm adapter convert titles.fmadapter my-adapter"))
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--model", type=PATH, help="Base model folder, for adapters that do not say what they were made for.")
@click.option("--reduce-rank", is_flag=True, help="To .pt and .fmadapter: approximate a larger rank; see export.")
@click.option(
    "--zero-untrained", is_flag=True, help="To .pt and .fmadapter: zeros where nothing was trained; see export."
)
@json_option
def convert(source: Path, target: Path, model: Path | None, as_json: bool, **allowed: bool) -> None:
    """Write SOURCE in the form TARGET's suffix asks for: .pt, .fmadapter, or a folder.

    The first two are brought to the rank and scale that their readers imply.
    """
    from mlx_afm.workflows.export import convert_adapter

    if target.suffix not in (".pt", ".fmadapter"):
        refuse_given(("reduce_rank", "zero_untrained"), "on an adapter folder, which holds any adapter as it is")
    show({"adapter": str(convert_adapter(source, target, model_path=model, on_note=note, **allowed))}, as_json)


@command.command("repair-manifest", epilog=example("mlx-afm adapter repair-manifest titles.manifest.json"))
@click.argument("manifest", type=PATH)
@json_option
def repair_manifest(manifest: Path, as_json: bool) -> None:
    """Make "onDemand": null in an asset pack's manifest.json {}, which uploads want (ITMS-91140)."""
    from mlx_afm.formats import asset_pack

    show({"manifest": str(manifest), "repaired": asset_pack.repair_manifest(manifest)}, as_json)
