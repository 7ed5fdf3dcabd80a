"""`mlx-afm plot`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, note, show
from .parameters import PATH, example


@click.command("plot", epilog=example("mlx-afm plot my-adapter other-adapter"))
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, help="File to draw into: .svg, or .png, .pdf, .jpg with matplotlib.")
@json_option
def command(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Draw the loss curves of one or more runs: adapter folders, or metrics.jsonl files."""
    from mlx_afm.workflows.plot import plot, read_runs

    text = plot(runs, output)
    if as_json:
        show({"curves": read_runs(runs), "output": None if output is None else str(output)}, as_json)
    else:
        click.echo(text)
        if output is not None:
            note(f"drawn into {output}")
