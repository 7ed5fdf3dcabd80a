"""`mlx-afm lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .data_options import FIELDS as DATA_FIELDS
from .interrupts import stop_on_signals
from .lora_options import with_options
from .outcome import note_best, outcome_of
from .output import json_option, note, resume_line, show
from .parameters import example, refuse_given
from .progress import show_event
from .settings import request_from

# What --test alone reads.
SCORING = ("model", "data", "adapter_path", "test", "best", "no_cache", "batch_size", "no_system_prompt", *DATA_FIELDS)


@click.command("lora", epilog=example("mlx-afm lora --train --model afm-mlx --data my-data --adapter-path my-adapter"))
@with_options
@json_option
def command(config: Path | None, as_json: bool, **flags: Any) -> int:
    """Train a LoRA adapter (--train), score it on held-out data (--test), or both."""
    from mlx_afm.runs.folder import best_adapter
    from mlx_afm.training import Event, TrainingResumed, TrainingStarted, join_ranks
    from mlx_afm.workflows.lora import require_valid_split, score, train

    request = request_from(config, flags)
    job = request.job
    if not (request.train or request.test):
        raise click.UsageError("nothing to do: give --train, --test or both")
    if not request.train:
        names = [name for name in flags if name not in SCORING]
        refuse_given(names, "on --test alone; give --train too, or leave them out")
    if not request.test:
        refuse_given(("best",), "without --test")
    if request.best and request.train:
        require_valid_split(job.data)
    ranks = join_ranks(job.train.rank_timeout_seconds)
    result: dict[str, Any] = {"adapter_path": str(job.adapter_path)}
    if request.train:
        with stop_on_signals(silent=not ranks.is_main_process) as stop:

            def watch(event: Event) -> None:
                stop.saves = stop.saves or isinstance(event, (TrainingStarted, TrainingResumed))
                show_event(event)

            trained = train(job, on_event=watch, should_stop=stop)
        if not ranks.is_main_process:
            return 0  # rank 0 tells, and its exit code counts
        result |= outcome_of(trained)
        if trained.interrupted:
            note(f"to go on: {resume_line()}")
            show({**result, "interrupted": True}, as_json)
            return stop.exit_code
        note_best(trained, job.model)
    if request.test and ranks.is_main_process:
        has_adapter = request.train or request.adapter_given or job.adapter_path.exists()
        note("scoring" if has_adapter else "scoring the base model: no --adapter-path")
        adapter = best_adapter(job.adapter_path) if request.best else job.adapter_path if has_adapter else None
        if adapter is not None:
            result |= {"tested_adapter": str(adapter)}
        scored = score(
            job.model,
            adapter,
            job.data,
            batch_size=job.train.batch_size,
            data_config=job.data_config,
            cache=job.cache,
            own_system_prompt=not request.system_given,
            on_event=show_event,
        )
        result |= {
            "test_loss": scored.loss,
            "test_perplexity": scored.perplexity,
            "test_tokens": scored.tokens,
            "test_examples": scored.examples,
            "adapter": has_adapter,
        }
    if ranks.is_main_process:
        show(result, as_json)
    return 0
