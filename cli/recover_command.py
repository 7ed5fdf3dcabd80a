"""`mlx-afm recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .interrupts import stop_on_signals
from .lora_options import recovery_options
from .outcome import note_best, outcome_of
from .output import json_option, note, resume_line, show
from .parameters import PATH, example
from .progress import show_event
from .settings import request_from


@click.command("recover", epilog=example("mlx-afm recover --model afm-2bit --data my-data --adapter-path recovered"))
@recovery_options
@click.option("--teacher", type=PATH, help="Folder of the dense model; for --loss distill.")
@click.option(
    "--loss",
    type=click.Choice(["distill", "next-token"]),
    default="distill",
    show_default=True,
    help="What to train on: the teacher's token distributions, or the next token of the data.",
)
@click.option(
    "--into-base",
    is_flag=True,
    help="Keep the adapter as the model's base_adapter: active by default, and later adapters start from it.",
)
@json_option
def command(config: Path | None, teacher: Path | None, loss: str, into_base: bool, as_json: bool, **flags: Any) -> int:
    """Train an adapter that recovers what quantization lost."""
    from mlx_afm.training import Event, TrainingResumed, TrainingStarted, join_ranks
    from mlx_afm.workflows.recover import RecoverJob, recover

    run = request_from(config, flags).job
    job = RecoverJob(run=run, loss=loss, teacher=teacher, into_base=into_base)
    ranks = join_ranks(run.train.rank_timeout_seconds)
    with stop_on_signals(silent=not ranks.is_main_process) as stop:

        def watch(event: Event) -> None:
            stop.saves = stop.saves or isinstance(event, (TrainingStarted, TrainingResumed))
            show_event(event)

        done = recover(job, on_event=watch, should_stop=stop)
    if not ranks.is_main_process:
        return 0  # rank 0 tells, and its exit code counts
    result: dict[str, Any] = {
        "adapter_path": str(run.adapter_path),
        **outcome_of(done.trained),
        "base_adapter": None if done.base_adapter is None else str(done.base_adapter),
    }
    if done.trained.interrupted:
        note(f"to go on: {resume_line()}")
        show({**result, "interrupted": True}, as_json)
        return stop.exit_code
    note_best(done.trained, run.model)
    show(result, as_json)
    return 0
