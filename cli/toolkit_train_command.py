"""`mlx-afm toolkit train_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .data_options import no_cache_option
from .interrupts import stop_on_signals
from .output import json_option, note, show
from .parameters import PATH, example
from .toolkit_options import assets_option, open_model, precision_option, without_meaning

WITHOUT_MEANING = {
    "compile_model": "compilation is a matter of torch",
    "fixed_sized_sequences": "padding costs time and changes no result",
}
OPTIONS = [
    click.option("--train-data", type=PATH, required=True, help="Conversations, one a line."),
    click.option("--eval-data", type=PATH, help="Conversations to evaluate on after each epoch."),
    click.option("--checkpoint-dir", type=PATH, required=True, help="Where the adapter-*.pt go."),
    click.option("--checkpoint-frequency", type=int, default=1, show_default=True, help="Epochs."),
    click.option("--epochs", type=int, default=2, show_default=True, help="Passes over the data."),
    click.option("-lr", "--learning-rate", type=float, default=1e-3, show_default=True, help="Its peak."),
    click.option("--warmup-epochs", type=float, default=1, show_default=True, help="In which the rate rises."),
    click.option("--batch-size", type=int, default=4, show_default=True, help="Examples, or packed rows."),
    click.option("--gradient-accumulation-steps", type=int, default=1, show_default=True, help="Batches a step."),
    click.option("--activation-checkpointing", is_flag=True, help="Less memory, a third more time."),
    click.option("--compile-model", is_flag=True, help="No effect."),
    click.option("--weight-decay", type=float, default=1e-2, show_default=True, help="AdamW's."),
    click.option("--clip-grad-norm", type=float, default=1.0, show_default=True, help="0 for no limit."),
    click.option("--max-sequence-length", type=int, help="1 to 4095; longer examples are cut at their end."),
    click.option("--fixed-sized-sequences", is_flag=True, help="No effect."),
    click.option("--pack-sequences", is_flag=True, help="Rows of that length, with several examples each."),
    click.option("--loss-update-frequency", type=int, default=3, show_default=True, help="Steps between reports."),
    precision_option,
    assets_option,
    no_cache_option,
    json_option,
]


def with_options(function: Any) -> Any:
    """Adds the options."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command(
    "train_adapter",
    epilog=example("mlx-afm toolkit train_adapter --train-data my.jsonl --checkpoint-dir out"),
)
@with_options
def command(assets: Path | None, precision: str, as_json: bool, **options: Any) -> int:
    """Train an adapter; adapter-final.pt and the best two adapter-epoch{n}.pt go to --checkpoint-dir."""
    from mlx_afm.workflows.toolkit_train import FINAL, ToolkitTraining, train_adapter

    from .progress import show_event

    if options["fixed_sized_sequences"] and options["max_sequence_length"] is None:
        raise click.UsageError("--fixed-sized-sequences needs --max-sequence-length")
    without_meaning(options, WITHOUT_MEANING)
    if options.pop("no_cache"):
        options["cache"] = None
    ToolkitTraining(model=Path(), **options).require_data()  # rather before a model is converted than after
    settings = ToolkitTraining(model=open_model(assets, precision), **options)
    with stop_on_signals() as stop:
        trained = train_adapter(settings, show_event, stop)
    if trained.interrupted:
        note(f"stopped after step {trained.steps}; run again to start anew")
        return stop.exit_code
    final = settings.checkpoint_dir / FINAL
    show({"checkpoint": str(final), "steps": trained.steps, "best_valid_loss": trained.best_loss}, as_json)
    return 0
