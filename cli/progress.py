"""Training events as lines on stderr."""

from __future__ import annotations

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


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
