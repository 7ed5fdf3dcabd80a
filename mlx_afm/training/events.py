"""What a training run tells whoever watches: typed events, no printing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

VALIDATION = "validation"  # the stage of `StageProgress` that ends with `Evaluated`


@dataclass(frozen=True, kw_only=True)
class DataRead:
    """A split was read and checked, before anything is loaded.

    Attributes:
        trained_tokens: how many of the tokens are targets.
        dropped_examples, removed_tokens: what was too long and left out, as the user chose.
    """

    split: str
    examples: int
    tokens: int
    trained_tokens: int
    dropped_examples: int
    removed_tokens: int


@dataclass(frozen=True, kw_only=True)
class MemoryEstimated:
    """Before anything is loaded: what the run will take, see `mlx_afm.memory`. Not in `metrics.jsonl`.

    Attributes:
        state_bytes: adapter and optimizer.
        working_bytes: of the largest block; `loss_bytes` comes in its place if that is more.
    """

    peak_bytes: int
    weights_bytes: int
    state_bytes: int
    activations_bytes: int
    working_bytes: int
    loss_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrainingStarted:
    """Before the first step.

    Attributes:
        state_bytes: size of the file that a run is resumed from.
    """

    total_steps: int
    trained_parameters: int
    examples: int
    state_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingResumed:
    """Instead of `TrainingStarted` when an earlier run goes on. Not in `metrics.jsonl`: that is one run's."""

    step: int
    total_steps: int
    best_loss: float | None


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
class Sampled:
    """After an evaluation, if samples are wanted: the model's greedy answer to a prompt."""

    step: int
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class LossSpiked:
    """A step's mean loss was far above the mean of the steps before it. The step counted."""

    step: int
    loss: float
    mean_before: float
    gradient_norm: float


@dataclass(frozen=True, kw_only=True)
class ZeroGradientsFound:
    """The gradient of some trained tensors was exactly zero in each of the first steps: they do not learn."""

    step: int
    names: tuple[str, ...]
    trained_tensors: int


@dataclass(frozen=True, kw_only=True)
class TrainingInterrupted:
    """The run was asked to stop, is saved and can be resumed. Not in `metrics.jsonl`."""

    step: int
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class TrainingFinished:
    """After the last step.

    Attributes:
        best_step: the step of `best_loss`.
        last_loss: validation loss of the last adapter; None without validation data.
        stopped_early: whether patience ended it before the last step planned.
        seconds: of training and evaluation, over all sittings of a resumed run.
    """

    step: int
    best_loss: float | None
    best_step: int = 0
    last_loss: float | None = None
    stopped_early: bool = False
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """How far a long stage of a command is. Not in `metrics.jsonl`.

    Attributes:
        stage: its name, such as "validation".
        done, total: in `unit`; the last event of a stage has done == total.
        unit: what is counted, such as "batches" or "bytes".
    """

    stage: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something a person should know, in one line. Not in `metrics.jsonl`."""

    text: str


Event = (
    DataRead
    | MemoryEstimated
    | TrainingStarted
    | TrainingResumed
    | StepsReported
    | Evaluated
    | Sampled
    | LossSpiked
    | ZeroGradientsFound
    | TrainingInterrupted
    | TrainingFinished
    | StageProgress
    | Notice
)


class Callback(Protocol):
    """Anything that can be called with an event: a function, or an object with `__call__`."""

    def __call__(self, event: Event, /) -> None:
        """Told of one event."""


EventHandler = Callback

# The events of `metrics.jsonl`, by the name they have there.
RECORDED: dict[type[Event], str] = {
    TrainingStarted: "start",
    StepsReported: "train",
    Evaluated: "eval",
    Sampled: "sample",
    LossSpiked: "spike",
    ZeroGradientsFound: "zero_gradients",
    TrainingFinished: "end",
}


def is_recorded(event: Event) -> bool:
    """Whether an event belongs into `metrics.jsonl`."""
    return type(event) in RECORDED


def to_record(event: Event) -> dict[str, Any]:
    """The event as one line of `metrics.jsonl`; JSON has no NaN, so what is not finite becomes None."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(event).items()}
    return {"event": RECORDED[type(event)], **finite}
