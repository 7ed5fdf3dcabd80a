"""`mlx-afm adapter`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, show


@click.group("adapter")
def command() -> None:
    """Adapters and their three forms: MLX folder, toolkit .pt, .fmadapter."""


@command.command("convert")
@click.argument("source", type=Path)
@click.argument("target", type=Path)
@click.option("--model", type=Path, help="Base model folder, for adapters that do not say what they were made for.")
@json_option
def convert(source: Path, target: Path, model: Path | None, as_json: bool) -> None:
    """Write SOURCE in the form TARGET's suffix asks for: .pt, .fmadapter, or a folder."""
    from mlx_afm.workflows.export import convert_adapter

    show({"adapter": str(convert_adapter(source, target, model_path=model))}, as_json)
