"""Where a run stands, and all that is needed to go on from there to the last bit."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx

from mlx_afm.errors import FormatError
from mlx_afm.training.step import StepResult

ADDED_LATER = {"last_loss", "last_step"}  # a state of release 0.1.0 lacks them
MIN_SPIKE_STEPS = 20  # below that a deviation says nothing


@dataclass
class Window:
    """Sums since the last report; part of the state, so that a resumed run reports the same means."""

    steps: int = 0
    loss: float = 0.0
    tokens: float = 0.0
    read_tokens: int = 0
    seconds: float = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        """Adds a step; one that was left out counts for time alone."""
        self.steps += 1
        self.seconds += seconds
        self.read_tokens += result.read_tokens
        if result.applied:
            self.loss += result.loss
            self.tokens += result.tokens


@dataclass
class TrainState:
    """Where a run stands. The position in the data is (epoch, cursor); that in the schedule is `step`.

    Attributes:
        step: optimizer steps done.
        epoch, cursor: the next micro-batch of `plan_batches(..., epoch=epoch)`.
        trained_tokens: targets so far.
        best_loss: lowest evaluation so far, nats per token.
        best_step: its step.
        last_loss: the last evaluation; None if there was none.
        last_step: its step.
        evaluations_without_best: in a row.
        skipped, skipped_in_a_row: steps left out because a gradient was not finite.
        spikes: losses far above those before.
        stopped_early: whether patience ended the run.
        interrupted: whether it was asked to stop.
        seconds: spent in steps and evaluations, over all sittings.
        step_seconds: spent in steps alone.
        recent: mean losses of the last steps, for the next spike.
        window: sums since the last report.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    trained_tokens: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    last_loss: float | None = None
    last_step: int = 0
    evaluations_without_best: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    stopped_early: bool = False
    interrupted: bool = False
    seconds: float = 0.0
    step_seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    window: Window = field(default_factory=Window)

    @property
    def loss_of_last(self) -> float | None:
        """Validation loss of the weights as they are; None if the last steps came after the last evaluation."""
        return self.last_loss if self.last_step == self.step else None

    def add(self, result: StepResult, seconds: float) -> None:
        """Counts a step."""
        self.step += 1
        self.seconds += seconds
        self.step_seconds += seconds
        self.trained_tokens += result.tokens if result.applied else 0
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.skipped += not result.applied
        self.window.add(result, seconds)

    def is_spike(self, loss: float, sigmas: float, window: int) -> tuple[bool, float]:
        """Whether a step's mean loss is that far above the mean of the last steps, and that mean.

        The loss joins the window afterwards, spike or not: a lasting rise is told once or twice.
        """
        mean = statistics.fmean(self.recent) if self.recent else math.nan
        enough = sigmas > 0 and len(self.recent) >= min(MIN_SPIKE_STEPS, window) and len(self.recent) > 1
        spike = enough and loss > mean + sigmas * max(statistics.stdev(self.recent), 1e-6 * abs(mean))
        self.recent = [*self.recent, loss][-window:]
        self.spikes += spike
        return spike, mean


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: with the same model, data and settings it goes on as if never left.

    Attributes:
        state: counters and positions.
        weights: the trained tensors by name.
        optimizer: its state by name.
        random: MLX's random state, which dropout draws from.
    """

    state: TrainState
    weights: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    random: int

    def values(self) -> dict[str, Any]:
        """What is not an array, as JSON knows it; numbers keep every bit."""
        return {"state": dataclasses.asdict(self.state), "random": self.random}


def snapshot_from(
    values: Any, weights: Mapping[str, mx.array], optimizer: Mapping[str, mx.array], *, where: object
) -> Snapshot:
    """A snapshot from its parts.

    Raises:
        FormatError: values that are not a snapshot's.
    """
    try:
        stored, random = dict(values["state"]), int(values["random"])
        window = Window(**stored.pop("window"))
        names = {item.name for item in fields(TrainState)} - {"window"}
        if set(stored) | ADDED_LATER != names or not isinstance(stored["step"], int) or not 0 <= random < 1 << 64:
            raise ValueError
        return Snapshot(TrainState(**stored, window=window), weights, optimizer, random)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("not the state of a run", where=where) from error


def random_state() -> int:
    """MLX's random state: the key of the default stream as one number."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return (int(high) << 32) | int(low)


def set_random_state(number: int) -> None:
    """Sets it: seeding with a number makes exactly that number the key."""
    mx.random.seed(number)
