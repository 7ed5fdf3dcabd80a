"""`mlx-afm fuse`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .outcome import chosen_adapter
from .output import json_option, note, show
from .progress import show_event


@click.command("fuse")
@click.option("--model", type=Path, required=True, help="MLX model folder.")
@click.option(
    "--adapter-path", type=Path, help="Adapter folder, .pt or .fmadapter; default: the model's own base adapter."
)
@click.option("--best", is_flag=True, help="Fuse the best adapter of the run in --adapter-path, not its last one.")
@click.option("--save-path", type=Path, default=Path("fused_model"), show_default=True, help="Folder to write.")
@click.option(
    "--dequantize",
    is_flag=True,
    help="Make a quantised model dense. Default: its codes stay, and the adapter beside them.",
)
@json_option
def command(
    model: Path, adapter_path: Path | None, best: bool, save_path: Path, dequantize: bool, as_json: bool
) -> None:
    """Merge an adapter into the weights; the result needs no adapter and runs in mlx-lm.

    Codes of a quantised model are never rounded anew. It says how far its logits are from the live
    adapter's on a fixed prompt, and how far the adapter itself moves them.
    """
    from mlx_afm.workflows.fuse import fuse

    adapter_path = chosen_adapter(adapter_path, best)
    note("fusing")
    done = fuse(model, adapter_path, save_path, dequantize=dequantize, on_event=show_event)
    if done.form == "codes":
        note("The adapter lies beside the codes, in base_adapter, and is active; mlx-lm takes it as its adapter path.")
    show(asdict(done), as_json)
