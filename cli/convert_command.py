"""`mlx-afm convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .output import json_option, note, show
from .parameters import PATH, example
from .progress import BytesProgress, show_event
from .quantize_options import quantize_options, take_quantization


@click.command("convert", epilog=example("mlx-afm convert --hf-path TOOLKIT --mlx-path afm-mlx --verify"))
@click.option(
    "--hf-path",
    "--model",
    "source",
    type=PATH,
    required=True,
    help="Toolkit folder, its assets, a .pt beside its JSON, an MLX folder, or the hub id of one.",
)
@click.option(
    "--mlx-path", "--out", "target", type=PATH, default=Path("mlx_model"), show_default=True, help="Folder to write."
)
@click.option("--to", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True, help="Format to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Cast the weights; bfloat16 halves a float32 model. Default: keep them, so that converting back is exact.",
)
@quantize_options
@click.option("--config", type=PATH, help="Configuration JSON of a .pt, if it is not beside the .pt.")
@click.option(
    "--verify", is_flag=True, help="Read the result back and compare it, derived values too, with the source."
)
@click.option("--no-tokenizer", is_flag=True, help="Convert a folder without tokenizer.model.")
@json_option
def command(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Convert a toolkit checkpoint to an MLX folder, or back with --to torch; quantize with -q."""
    from mlx_afm.workflows.convert import convert

    quantizing = take_quantization(options)
    if "init_adapter" in quantizing or "calibration" in quantizing:
        note("measuring the model first; writing starts after that")
    with BytesProgress("converting") as progress:
        done = convert(source, target, on_progress=progress.handle, on_event=show_event, **quantizing, **options)
    if done.left_dense:
        note(f"Not quantized, because the group size does not divide their width: {', '.join(done.left_dense)}")
    if done.wrapper_key is not None:
        note(f"The checkpoint holds more than the model; the model was read from its key {done.wrapper_key!r}")
    if done.base_adapter == "active" and done.form == "mlx":
        note(
            "The base model has an adapter that is not zero. mlx-afm applies it, mlx-lm does not. "
            "For mlx-lm, merge it into the weights: mlx-afm fuse."
        )
    show(asdict(done), as_json)
