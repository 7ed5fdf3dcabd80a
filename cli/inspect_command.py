"""`mlx-afm inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, show
from .parameters import PATH, example


@click.command("inspect", epilog=example("mlx-afm inspect titles.fmadapter"))
@click.argument("path", type=PATH)
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what a file or folder is, and what is in it; only headers are read."""
    from mlx_afm.workflows.inspect import inspect

    show(inspect(path), as_json)
