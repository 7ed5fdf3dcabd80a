"""Training events and bytes converted, on stderr."""

from __future__ import annotations

import sys
import time

import click

from mlx_afm.training import Evaluated, Event, StepsReported, TrainingFinished, TrainingStarted

from .output import note


def show_event(event: Event) -> None:
    """Prints one event."""
    note(_line(event))


def _line(event: Event) -> str:
    if isinstance(event, TrainingStarted):
        return (
            f"training {event.trained_parameters:,} parameters on {event.examples:,} examples, "
            f"{event.total_steps:,} steps"
        )
    if isinstance(event, StepsReported):
        line = (
            f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}  "
            f"{event.tokens_per_second:,.0f} tokens/s  peak {event.peak_memory_bytes / 2**30:.2f} GiB  "
            f"ETA {duration(event.seconds_left)}"
        )
        return line + (f"  skipped {event.skipped_steps}" if event.skipped_steps else "")
    if isinstance(event, Evaluated):
        return f"step {event.step}  validation loss {event.loss:.4f}" + ("  (best so far)" if event.best else "")
    assert isinstance(event, TrainingFinished)
    return f"done after {event.step} steps, {duration(event.seconds)}"


class BytesProgress:
    """Bytes done, rate and time left, on stderr.

    Where a person watches one line is rewritten ten times a second; else there is a line every five
    seconds. The last byte always shows.
    """

    def __init__(self, what: str) -> None:
        self.what, self.terminal = what, sys.stderr.isatty()
        self.started = self.shown = time.perf_counter()

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.shown > self.started:
            note("")

    def handle(self, done: int, total: int) -> None:
        """Told of bytes done and in all."""
        now = time.perf_counter()
        if done < total and now - self.shown < (0.1 if self.terminal else 5):
            return
        self.shown, elapsed, share = now, now - self.started, done / max(total, 1)
        line = (
            f"{self.what} {done / 1e9:.2f} of {total / 1e9:.2f} GB  {done / 1e6 / max(elapsed, 1e-9):,.0f} MB/s  "
            f"ETA {duration(elapsed / share * (1 - share))}"
        )
        click.echo(f"\r{line}   " if self.terminal else line, nl=not self.terminal, err=True)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
