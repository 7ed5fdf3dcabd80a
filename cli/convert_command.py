"""`mlx-afm convert`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, note, show


@click.command("convert")
@click.option(
    "--hf-path",
    "--model",
    "source",
    type=Path,
    required=True,
    help="Toolkit folder, its assets, a .pt beside its JSON, or (with --to torch) an MLX folder.",
)
@click.option(
    "--mlx-path", "--out", "target", type=Path, default=Path("mlx_model"), show_default=True, help="Folder to write."
)
@click.option(
    "--to", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True, help="Which form to write."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Cast the weights; bfloat16 halves a float32 model. Default: as they are, so that the way back is exact.",
)
@click.option("--no-tokenizer", is_flag=True, help="Convert a folder without tokenizer.model.")
@json_option
def command(source: Path, target: Path, to: str, dtype: str | None, no_tokenizer: bool, as_json: bool) -> None:
    """Convert a toolkit checkpoint to an MLX folder, or back with --to torch."""
    from mlx_afm.workflows.convert import convert

    done = convert(
        source, target, to=to, dtype=dtype, no_tokenizer=no_tokenizer, on_file=lambda name: note(f"writing {name}")
    )
    if done.base_adapter == "active" and done.form == "mlx":
        note("The base model carries an adapter that is not zero. mlx-afm applies it, stock mlx-lm would not: fuse.")
    show(
        {"folder": str(done.folder), "form": done.form, "tensors": done.tensors, "base_adapter": done.base_adapter},
        as_json,
    )
