"""`mlx-afm draft`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .data_options import FIELDS
from .interrupts import stop_on_signals
from .lora_options import draft_options
from .outcome import outcome_of
from .output import json_option, note, resume_line, show
from .parameters import PATH, example, refuse_given
from .progress import show_event
from .settings import request_from

if TYPE_CHECKING:
    from mlx_afm.workflows.draft import DraftReport

EXAMPLE = "mlx-afm draft --model afm-2bit --draft-model draft-mlx --data my-data --output my-draft"
MEASURED = {"data", "no_cache", "no_system_prompt", *FIELDS}  # what is read to measure
START = "start"  # of the run's folder: the draft that --init makes
SMALL = {"small": (12, 256, 2), "tiny": (4, 128, 2)}  # layers, width, heads


@click.command("draft", epilog=example(EXAMPLE))
@click.option(
    "--model", type=PATH, help="Folder of the target: the model that the draft will serve, dense or quantized."
)
@click.option("--adapter-path", type=PATH, help="Adapter on the target: folder, .pt or .fmadapter.")
@click.option("--draft-model", type=PATH, help="Folder of the draft model to train, from draft-model.pt.")
@click.option("--init", type=click.Choice(list(SMALL)), help="Instead of --draft-model: a new one with random weights.")
@click.option("--output", type=PATH, help="Folder for the run; the trained draft is in its folder model.")
@click.option(
    "--loss",
    type=click.Choice(["toolkit", "forward-kl", "tv", "alpha", "hybrid"]),
    default="forward-kl",
    show_default=True,
    help="What training lowers; toolkit is the loss of Apple's toolkit.",
)
@click.option("--test", is_flag=True, help="Do not train: measure the acceptance of --draft-model on --data.")
@draft_options
@json_option
def command(
    config: Path | None,
    model: Path | None,
    adapter_path: Path | None,
    draft_model: Path | None,
    init: str | None,
    output: Path | None,
    loss: str,
    test: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Train a draft model, so that answers come faster with the same text, and measure what it gains."""
    from mlx_afm.data.sources import require_splits
    from mlx_afm.training import Event, TrainingResumed, TrainingStarted, join_ranks
    from mlx_afm.workflows.draft import WHOLE, DraftJob, measure_pair, new_draft, train_draft

    given = {"--model": model, "--output": None if test else output, "--draft-model or --init": draft_model or init}
    if missing := [name for name, value in given.items() if value is None and not (test and name == "--output")]:
        raise click.UsageError(f"missing {', '.join(missing)}")
    if init is not None and (draft_model is not None or test):
        raise click.UsageError("--init: no effect with --draft-model or --test")
    if test and output is not None:
        raise click.UsageError("--output: no effect with --test")
    assert model is not None
    output = output or Path()
    values = {**flags, "model": draft_model or output / START, "adapter_path": output}
    run = request_from(config, {**values, "fine_tune_type": WHOLE.fine_tune_type}).job
    if init is not None and not (run.model / "config.json").is_file():
        require_splits(run.data)  # before anything is written
        layers, width, heads = SMALL[init]
        new_draft(run.model, model, layers=layers, width=width, heads=heads)
    if test:
        refuse_given(("loss", *(name for name in flags if name not in MEASURED)), "with --test")
        report = measure_pair(model, adapter_path, run, run.model, on_event=show_event)
        if as_json:
            show(report.to_dict(), True)
        else:
            _show_report("", report)
        return 0
    job = DraftJob(run=run, target=model, target_adapter=adapter_path, loss=loss)
    ranks = join_ranks(run.train.rank_timeout_seconds)
    with stop_on_signals(silent=not ranks.is_main_process) as stop:

        def watch(event: Event) -> None:
            stop.saves = stop.saves or isinstance(event, (TrainingStarted, TrainingResumed))
            show_event(event)

        done = train_draft(job, on_event=watch, should_stop=stop)
    if not ranks.is_main_process:
        return 0  # rank 0 tells, and its exit code counts
    result: dict[str, Any] = {"output": str(output), **outcome_of(done.trained)}
    if done.trained.interrupted or done.before is None or done.after is None:
        note(f"to go on: {resume_line()}")
        show({**result, "interrupted": True}, as_json)
        return stop.exit_code
    result |= {"draft_model": str(done.folder)}
    if as_json:
        show({**result, "before": done.before.to_dict(), "after": done.after.to_dict()}, True)
        return 0
    show(result, False)
    _show_report("before training", done.before)
    _show_report("after training", done.after)
    return 0


def _show_report(title: str, report: DraftReport) -> None:
    """Acceptance by position, and what each number of proposals gives, as two tables."""
    found = report.acceptance
    click.echo(
        f"{title + ': ' if title else ''}acceptance {found.sampled:.1%} sampled, {found.greedy:.1%} greedy, "
        f"of {found.tokens:,} tokens"
    )
    click.echo("  position   tokens  sampled   greedy")
    for first, tokens, sampled, greedy in found.by_position:
        click.echo(f"  {first:>5} on  {tokens:>7,}  {sampled:>7.1%}  {greedy:>7.1%}")
    click.echo("  proposals  tokens a pass (greedy)  predicted speed-up  pays from an acceptance of")
    rows = zip(found.greedy_tokens_per_pass, report.speed_ups, report.break_even)
    for length, (each, speed_up, least) in enumerate(rows, 1):
        limit = "never" if least > 1 else f"{least:.0%}"
        click.echo(f"  {length:>9}  {each:>22.2f}  {speed_up:>18.2f}  {limit:>26}")
    best = f"{report.best_length} proposals" if report.best_length else "none: plain decoding is faster here"
    click.echo(f"  the draft's time of a token is {report.cost_ratio:.2f} of the target's; best: {best}")
