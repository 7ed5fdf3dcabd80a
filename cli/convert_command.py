"""`mlx-afm convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .output import json_option, note, show
from .progress import BytesProgress, show_event
from .quantize_options import quantize_options, take_quantization


@click.command("convert")
@click.option(
    "--hf-path",
    "--model",
    "source",
    type=Path,
    required=True,
    help="Toolkit folder, its assets, a .pt beside its JSON, an MLX folder, or the hub id of one.",
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
@quantize_options
@click.option("--config", type=Path, help="The JSON of a lone .pt, if it does not lie beside it.")
@click.option("--verify", is_flag=True, help="Read everything back and compare it with the source.")
@click.option("--no-tokenizer", is_flag=True, help="Convert a folder without tokenizer.model.")
@json_option
def command(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Convert a toolkit checkpoint to an MLX folder, or back with --to torch; quantise with -q."""
    from mlx_afm.workflows.convert import convert

    quantizing = take_quantization(options)
    if "init_adapter" in quantizing or "calibration" in quantizing:
        note("computing first what the codes are to be fitted to; writing begins after that")
    with BytesProgress("converting") as progress:
        done = convert(source, target, on_progress=progress.handle, on_event=show_event, **quantizing, **options)
    if done.left_dense:
        note(f"Left dense, since groups do not divide their widths: {', '.join(done.left_dense)}")
    if done.wrapper_key is not None:
        note(f"The state dict was under the key {done.wrapper_key!r} of a larger checkpoint; the rest was left alone.")
    if done.base_adapter == "active" and done.form == "mlx":
        note("The base model carries an adapter that is not zero. mlx-afm applies it, stock mlx-lm would not: fuse.")
    show(asdict(done), as_json)
