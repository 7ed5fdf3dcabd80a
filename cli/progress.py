"""Training events and bytes converted, on stderr."""

from __future__ import annotations

import sys
import time

import click

from mlx_afm.training import (
    DataRead,
    Evaluated,
    Event,
    LossSpiked,
    MemoryEstimated,
    Notice,
    Sampled,
    StageProgress,
    StepsReported,
    TrainingFinished,
    TrainingInterrupted,
    TrainingResumed,
    TrainingStarted,
    ZeroGradientsFound,
)
from mlx_afm.training.events import VALIDATION

from .output import note

BRIEF = {VALIDATION}  # a line of its own follows: its loss


def show_event(event: Event) -> None:
    """Prints one event; progress of stages only now and then."""
    if isinstance(event, StageProgress):
        _STAGES.show(event)
        return
    _STAGES.end()
    note(_line(event))


def _line(event: Event) -> str:
    if isinstance(event, DataRead):
        counts = f"{event.examples:,} examples, {event.tokens:,} tokens, {event.trained_tokens:,} of them trained"
        line = f"{event.split}: {counts}"
        lost = f"; too long: {event.dropped_examples:,} left out, {event.removed_tokens:,} tokens less"
        return line + (lost if event.removed_tokens else "")
    if isinstance(event, MemoryEstimated):
        return (
            f"estimated peak memory {event.peak_bytes / 1e9:.2f} GB: weights {event.weights_bytes / 1e9:.2f}, adapter "
            f"and optimizer {event.state_bytes / 1e9:.2f}, activations {event.activations_bytes / 1e9:.2f}, "
            f"then the larger of loss {event.loss_bytes / 1e9:.2f} and working space {event.working_bytes / 1e9:.2f}"
        )
    if isinstance(event, TrainingStarted):
        return (
            f"training {event.trained_parameters:,} parameters on {event.examples:,} examples, "
            f"{event.total_steps:,} steps; state to resume from: {event.state_bytes / 1e6:,.1f} MB"
        )
    if isinstance(event, TrainingResumed):
        best = "" if event.best_loss is None else f", best validation loss {event.best_loss:.4f}"
        return f"resuming after step {event.step} of {event.total_steps}{best}"
    if isinstance(event, StepsReported):
        line = (
            f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}  "
            f"{event.tokens_per_second:,.0f} tokens/s  peak {event.peak_memory_bytes / 1e9:.2f} GB  "
            f"ETA {duration(event.seconds_left)}"
        )
        return line + (f"  skipped {event.skipped_steps}" if event.skipped_steps else "")
    if isinstance(event, Evaluated):
        return f"step {event.step}  validation loss {event.loss:.4f}" + ("  (best so far)" if event.best else "")
    if isinstance(event, Sampled):
        return f"step {event.step}  {event.prompt!r} -> {event.answer!r}"
    if isinstance(event, LossSpiked):
        return f"step {event.step}  loss spike: {event.loss:.4f}, {event.mean_before:.4f} before"
    if isinstance(event, ZeroGradientsFound):
        first = ", ".join(event.names[:3]) + (", ..." if len(event.names) > 3 else "")
        count = f"{len(event.names)} of {event.trained_tensors} trained tensors"
        return f"step {event.step}  warning: the gradient of {count} is exactly zero, so they do not learn: {first}"
    if isinstance(event, TrainingInterrupted):
        return f"stopped and saved after step {event.step} of {event.total_steps}"
    if isinstance(event, Notice):
        return event.text
    assert isinstance(event, TrainingFinished)
    early = f" (no better than at step {event.best_step})" if event.stopped_early else ""
    return f"done after {event.step} steps{early}, {duration(event.seconds)}"


class BytesProgress:
    """Bytes done, rate and time left, on stderr, for `convert`'s `on_progress`."""

    def __init__(self, what: str) -> None:
        self.what, self.lines = what, StageLines()

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.end()

    def handle(self, done: int, total: int) -> None:
        """Told of bytes done and in all."""
        self.lines.show(StageProgress(stage=self.what, done=done, total=total, unit="bytes"))


class StageLines:
    """Progress of long stages on stderr: what is done, rate and time left.

    Where a person watches, one line is rewritten ten times a second; else there is a line every five seconds. The end
    of a stage always shows, but for the stages in `BRIEF`, which are told of otherwise.
    """

    def __init__(self) -> None:
        self.terminal, self.stage, self.open = False, "", False
        self.first, self.done, self.started, self.shown = 0, 0, 0.0, 0.0

    def show(self, event: StageProgress) -> None:
        """Shows an event, if it is time to."""
        now = time.perf_counter()
        if event.stage != self.stage or event.done < self.done:
            self.end()
            self.terminal, self.stage, self.started, self.shown = sys.stderr.isatty(), event.stage, now, now
            self.first = event.done
        self.done = event.done
        last = event.done >= event.total
        if now - self.shown >= (0.1 if self.terminal else 5) or (last and event.stage not in BRIEF):
            self.shown, self.open = now, self.terminal
            text = _stage_text(event, event.done - self.first, now - self.started)
            click.echo(f"\r{text}   " if self.terminal else text, nl=not self.terminal, err=True)
        if last:
            self.end()

    def end(self) -> None:
        """Ends the line that is being rewritten; the next event begins a stage."""
        if self.open:
            note("")
        self.stage, self.open, self.done = "", False, 0


def _stage_text(event: StageProgress, counted: int, elapsed: float) -> str:
    """What is done, and the rate and time left by what was done since the stage began."""
    in_bytes = event.unit == "bytes"
    text = f"{event.stage}: {event.done:,} of {event.total:,} {event.unit}"
    if in_bytes:
        text = f"{event.stage} {event.done / 1e9:.2f} of {event.total / 1e9:.2f} GB"
    if not counted or elapsed <= 0:
        return text
    rate = counted / elapsed
    speed = f"{rate / 1e6:,.0f} MB/s" if in_bytes else f"{rate:,.1f}/s"
    return f"{text}  {speed}  ETA {duration((event.total - event.done) / rate)}"


_STAGES = StageLines()  # of `show_event`


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
