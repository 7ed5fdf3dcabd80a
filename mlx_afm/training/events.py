"""What a training run tells whoever watches: typed events, no printing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingStarted:
    """Before the first step."""

    total_steps: int
    trained_parameters: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class StepsReported:
    """Means over the steps since the last report.

    Attributes:
        loss: nats per trained token; NaN if every step was skipped.
        tokens_per_second: tokens read (padding excluded) per second.
        trained_tokens: targets so far.
        seconds_left: estimate for the rest, evaluation excluded.
        skipped_steps: steps so far that were left out because a gradient was not finite.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    trained_tokens: int
    seconds_left: float
    peak_memory_bytes: int
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """After an evaluation on held-out data; `best` if no earlier one was lower."""

    step: int
    loss: float
    tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainingFinished:
    """After the last step."""

    step: int
    best_loss: float | None
    seconds: float


Event = TrainingStarted | StepsReported | Evaluated | TrainingFinished
EventHandler = Callable[[Event], None]


def to_record(event: Event) -> dict[str, Any]:
    """The event as one line of `metrics.jsonl`; JSON has no NaN, so what is not finite becomes None."""
    names = {StepsReported: "train", Evaluated: "eval", TrainingStarted: "start", TrainingFinished: "end"}
    values = asdict(event)
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return {"event": names[type(event)], **finite}
