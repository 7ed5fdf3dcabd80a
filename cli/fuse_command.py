"""`mlx-afm fuse`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import json_option, note, show


@click.command("fuse")
@click.option("--model", type=Path, required=True, help="MLX model folder.")
@click.option(
    "--adapter-path", type=Path, help="Adapter folder, .pt or .fmadapter; default: the model's own base adapter."
)
@click.option("--save-path", type=Path, default=Path("fused_model"), show_default=True, help="Folder to write.")
@click.option("--dequantize", is_flag=True, help="Write dense weights; dense models are dense anyway.")
@json_option
def command(model: Path, adapter_path: Path | None, save_path: Path, dequantize: bool, as_json: bool) -> None:
    """Merge an adapter into the weights; the result needs no adapter and runs in mlx-lm."""
    from mlx_afm.workflows.fuse import fuse

    note("fusing")
    show({"folder": str(fuse(model, adapter_path, save_path))}, as_json)
