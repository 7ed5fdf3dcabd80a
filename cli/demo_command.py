"""`mlx-afm demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .output import json_option, note, show
from .parameters import PATH, example
from .progress import show_event


@click.command("demo", epilog=example("mlx-afm demo --out demo-out"))
@click.option("--out", type=PATH, default=Path("demo-out"), show_default=True, help="Folder for everything it makes.")
@json_option
def command(out: Path, as_json: bool) -> None:
    """Convert, train, score, fuse, generate and export a tiny model, in minutes and without any download."""
    from mlx_afm.workflows.demo import run_demo

    result = run_demo(out, on_step=lambda text: note(f"* {text}"), on_event=show_event)
    values = asdict(result)
    if not as_json:
        for name in ("exact_match_before", "exact_match_after", "exact_match_fused"):
            values[name] = f"{values[name]:.0%}"
        note("The tiny model has the real model's architecture but not its sizes: its package is for no device.")
    show(values, as_json)
