"""`mlx-afm fuse`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .outcome import chosen_adapter
from .output import json_option, note, show
from .parameters import PATH, example
from .progress import show_event


@click.command("fuse", epilog=example("mlx-afm fuse --model afm-mlx --adapter-path my-adapter --save-path fused"))
@click.option("--model", type=PATH, required=True, help="MLX model folder.")
@click.option(
    "--adapter-path", type=PATH, help="Adapter folder, .pt or .fmadapter; default: the model's own base adapter."
)
@click.option("--best", is_flag=True, help="Fuse the best adapter of the run in --adapter-path, not its last one.")
@click.option("--save-path", type=PATH, default=Path("fused_model"), show_default=True, help="Folder to write.")
@click.option(
    "--dequantize",
    is_flag=True,
    help="Make a quantized model dense. Default: its weights stay quantized, and the adapter is kept beside them.",
)
@json_option
def command(
    model: Path, adapter_path: Path | None, best: bool, save_path: Path, dequantize: bool, as_json: bool
) -> None:
    """Merge an adapter into the weights; the result needs no adapter and runs in mlx-lm.

    Quantized weights are not rounded again. The result states two differences of logits on a fixed prompt: between
    the fused model and the model with its adapter, and between that and the model without the adapter.
    """
    from mlx_afm.workflows.fuse import fuse

    adapter_path = chosen_adapter(adapter_path, best)
    note("fusing")
    done = fuse(model, adapter_path, save_path, dequantize=dequantize, on_event=show_event)
    if done.form == "codes":
        note("The adapter lies beside the codes, in base_adapter, and is active; mlx-lm takes it as its adapter path.")
    show(asdict(done), as_json)
