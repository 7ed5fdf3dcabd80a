"""What the toolkit's commands share: where the model is, in which precision, and options without meaning here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import note
from .parameters import PATH

assets_option = click.option(
    "--assets",
    type=PATH,
    help="The toolkit's assets.  [default: $MLX_AFM_TOOLKIT_ASSETS, else assets in the current folder]",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["f32", "bf16", "bf16-mixed", "f16-mixed"]),
    default="bf16-mixed",
    show_default=True,
    help="Precision of the frozen base model; adapters are always float32.",
)


def open_model(assets: Path | None, precision: str) -> Path:
    """The converted model, and a line about what the precision means here."""
    from mlx_afm.workflows.toolkit import PRECISIONS, find_assets, model_folder

    from .progress import BytesProgress

    note(PRECISIONS[precision].note)
    with BytesProgress("converting") as progress:
        return model_folder(find_assets(assets), precision, on_note=note, on_progress=progress.handle)


def without_meaning(options: dict[str, Any], reasons: dict[str, str]) -> None:
    """Takes options out that change nothing here, and says so of those that were given."""
    for name, reason in reasons.items():
        if options.pop(name):
            note(f"--{name.replace('_', '-')}: no effect here: {reason}")
