"""`mlx-afm lora`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .output import json_option, note, show
from .progress import show_event
from .settings import request_from

# Training and adapter options have no defaults here: the dataclasses have, below file and flags.
OPTIONS = [
    click.option("--model", type=Path, help="MLX model folder."),
    click.option("--data", type=Path, help="Folder with train/valid/test.jsonl, or one file."),
    click.option("--adapter-path", type=Path, help="Folder for the adapter.  [default: adapters]"),
    click.option("--config", "-c", type=Path, help="YAML file with these options; flags win."),
    click.option("--train", is_flag=True, help="Train."),
    click.option("--test", is_flag=True, help="Score the adapter on test.jsonl."),
    click.option("--iters", type=int, help="Optimizer steps; default: by epochs."),
    click.option("--epochs", type=int, help="Passes over the data.  [default: 2]"),
    click.option("--batch-size", type=int, help="Examples per step.  [default: 4]"),
    click.option("--grad-accumulation-steps", type=int, help="Batches per step.  [default: 1]"),
    click.option("--learning-rate", type=float, help="Peak rate.  [default: 0.001]"),
    click.option("--warmup", type=float, help="Share of the steps to reach it.  [default: 0.05]"),
    click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), help="[default: cosine]"),
    click.option("--weight-decay", type=float, help="AdamW's.  [default: 0.01]"),
    click.option("--clip-grad-norm", type=float, help="0 for no limit.  [default: 1.0]"),
    click.option("--steps-per-report", type=int, help="[default: 10]"),
    click.option("--steps-per-eval", type=int, help="[default: 200]"),
    click.option("--save-every", type=int, help="Steps.  [default: 100]"),
    click.option("--val-batches", type=int, help="-1 for all.  [default: -1]"),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--rank", type=int, help="Devices take 32.  [default: 32]"),
    click.option("--scale", type=float, help="alpha / rank; devices apply 0.5.  [default: 0.5]"),
    click.option("--dropout", type=float, help="[default: 0]"),
    click.option("--targets", help="Some of q,k,v,o,gate,up,down.  [default: all]"),
    click.option("--max-seq-length", type=int, help="Longest example, in tokens.  [default: 4096]"),
    click.option("--name", help="Name of a later package; checked before training."),
]


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command("lora")
@_with_options
@json_option
def command(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Train a LoRA adapter (--train), score it on held-out data (--test), or both."""
    from mlx_afm.workflows.lora import score, train

    request = request_from(config, flags)
    job = request.job
    if not (request.train or request.test):
        raise click.UsageError("nothing to do: give --train, --test or both")
    result: dict[str, Any] = {"adapter_path": str(job.adapter_path)}
    if request.train:
        trained = train(job, on_event=show_event)
        result |= {"steps": trained.steps, "best_valid_loss": trained.best_loss}
    if request.test:
        has_adapter = request.train or request.adapter_given or job.adapter_path.exists()
        note("scoring" if has_adapter else "scoring the base model: no --adapter-path")
        adapter = job.adapter_path if has_adapter else None
        scored = score(job.model, adapter, job.data, batch_size=job.train.batch_size, max_tokens=job.max_tokens)
        result |= {
            "test_loss": scored.loss,
            "test_perplexity": scored.perplexity,
            "test_tokens": scored.tokens,
            "test_examples": scored.examples,
            "adapter": has_adapter,
        }
    show(result, as_json)
