"""The training loop: steps, reports, evaluations, and when to save. It knows no files and no LoRA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten

from mlx_afm.data import Batch, Tokens, make_batch, plan_batches, plan_in_order
from mlx_afm.errors import ConfigError
from mlx_afm.model import Model
from mlx_afm.training.config import TrainConfig
from mlx_afm.training.events import Evaluated, EventHandler, StepsReported, TrainingFinished, TrainingStarted
from mlx_afm.training.schedule import learning_rate
from mlx_afm.training.step import StepResult, evaluate, require_float32, train_step

MAX_SKIPPED_IN_A_ROW = 10

Save = Callable[[str], None]  # called with "last" or "best"


@dataclass
class TrainState:
    """Where a run stands. The position in the data is (epoch, cursor).

    Attributes:
        step: optimizer steps done.
        epoch, cursor: the next micro-batch of `plan_batches(..., epoch=epoch)`.
        trained_tokens: targets so far.
        best_loss: lowest evaluation so far, nats per token.
        skipped, skipped_in_a_row: steps left out because a gradient was not finite.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    trained_tokens: float = 0.0
    best_loss: float | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class _Window:
    """Sums since the last report."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    loss: float = 0.0
    tokens: float = 0.0
    read_tokens: int = 0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.read_tokens += result.read_tokens
        if result.applied:
            self.loss += result.loss
            self.tokens += result.tokens


def train(
    model: Model,
    train_data: Sequence[Tokens],
    valid_data: Sequence[Tokens],
    config: TrainConfig,
    *,
    on_event: EventHandler = lambda event: None,
    save: Save = lambda kind: None,
) -> TrainState:
    """Trains whatever is trainable in the model, in place.

    Args:
        model: its trainable tensors must be float32; everything else is frozen.
        train_data, valid_data: encoded examples; without `valid_data` there is no best.
        config: see `TrainConfig`.
        on_event: told of progress.
        save: called with "last" every `save_every` steps and at the end, and with "best" after each
            evaluation that is lower than all before.

    Raises:
        ConfigError: nothing to train, or not float32, or no data; or ten steps in a row without a
            finite gradient.
    """
    require_float32(model)
    if not train_data:
        raise ConfigError("no training examples")
    mx.random.seed(config.seed)  # dropout draws from the default stream
    run = _Run(model, train_data, valid_data, config, on_event, save)
    return run.all_steps()


class _Run:
    def __init__(
        self,
        model: Model,
        train_data: Sequence[Tokens],
        valid_data: Sequence[Tokens],
        config: TrainConfig,
        on_event: EventHandler,
        save: Save,
    ) -> None:
        self.model, self.config, self.on_event, self.save = model, config, on_event, save
        self.train_data, self.valid_data = train_data, valid_data
        self.lengths = [len(tokens) for tokens in train_data]
        per_epoch = math.ceil(math.ceil(len(train_data) / config.batch_size) / config.grad_accumulation_steps)
        self.total_steps = config.iters or config.epochs * per_epoch
        self.optimizer = AdamW(
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
        )
        self.state = TrainState()

    def all_steps(self) -> TrainState:
        """Runs to the end: evaluate, then step, report, save and evaluate as configured."""
        started = time.perf_counter()
        count = sum(array.size for _, array in tree_flatten(self.model.trainable_parameters()))
        self.on_event(
            TrainingStarted(total_steps=self.total_steps, trained_parameters=count, examples=len(self.train_data))
        )
        self._evaluate()
        self.model.train()
        window, seconds = _Window(), 0.0
        for batches in self._micro_batches():
            result = self._step(batches)
            window.add(result)
            if self.state.step % self.config.steps_per_report == 0 or self.state.step == self.total_steps:
                seconds += self._report(window, result, seconds)
                window = _Window()
            if self.state.step % self.config.save_every == 0 or self.state.step == self.total_steps:
                self.save("last")
            if self.state.step % self.config.steps_per_eval == 0 or self.state.step == self.total_steps:
                self._evaluate()
                window.started = time.perf_counter() if not window.steps else window.started
        self.model.eval()
        elapsed = time.perf_counter() - started
        self.on_event(TrainingFinished(step=self.state.step, best_loss=self.state.best_loss, seconds=elapsed))
        return self.state

    def _micro_batches(self) -> Iterator[list[Batch]]:
        config, state = self.config, self.state
        while state.step < self.total_steps:
            plan = plan_batches(self.lengths, config.batch_size, seed=config.seed, epoch=state.epoch)
            while state.cursor < len(plan) and state.step < self.total_steps:
                chosen = plan[state.cursor : state.cursor + config.grad_accumulation_steps]
                yield [make_batch([self.train_data[index] for index in indices]) for indices in chosen]
                state.cursor += len(chosen)
            if state.cursor >= len(plan):
                state.epoch, state.cursor = state.epoch + 1, 0

    def _step(self, batches: list[Batch]) -> StepResult:
        config, state = self.config, self.state
        self.optimizer.learning_rate = learning_rate(config, state.step, self.total_steps)
        result = train_step(self.model, self.optimizer, batches, clip_norm=config.clip_grad_norm)
        state.step += 1
        state.trained_tokens += result.tokens if result.applied else 0
        state.skipped_in_a_row = 0 if result.applied else state.skipped_in_a_row + 1
        state.skipped += not result.applied
        if state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            advice = "Lower --learning-rate; convert a float16 base to bfloat16. The last saved adapter is intact."
            raise ConfigError(f"{state.skipped_in_a_row} steps in a row without a finite gradient", advice=advice)
        return result

    def _report(self, window: _Window, result: StepResult, seconds_before: float) -> float:
        elapsed = time.perf_counter() - window.started
        done, left = self.state.step, self.total_steps - self.state.step
        self.on_event(
            StepsReported(
                step=done,
                total_steps=self.total_steps,
                epoch=self.state.epoch,
                loss=window.loss / window.tokens if window.tokens else math.nan,
                learning_rate=float(self.optimizer.learning_rate.item()),
                gradient_norm=result.gradient_norm,
                tokens_per_second=window.read_tokens / elapsed,
                trained_tokens=round(self.state.trained_tokens),
                seconds_left=(seconds_before + elapsed) / done * left,
                peak_memory_bytes=mx.get_peak_memory(),
                skipped_steps=self.state.skipped,
            )
        )
        return elapsed

    def _evaluate(self) -> None:
        if not self.valid_data:
            return
        started = time.perf_counter()
        loss, tokens = evaluate_data(self.model, self.valid_data, self.config.batch_size, self.config.val_batches)
        mean = loss / tokens
        best = self.state.best_loss is None or mean < self.state.best_loss
        if best:
            self.state.best_loss = mean
            self.save("best")
        elapsed = time.perf_counter() - started
        self.on_event(Evaluated(step=self.state.step, loss=mean, tokens=round(tokens), best=best, seconds=elapsed))


def evaluate_data(model: Model, data: Sequence[Tokens], batch_size: int, max_batches: int = -1) -> tuple[float, float]:
    """Sum of losses (nats) and of target weights over examples, in their order."""
    plan = plan_in_order(len(data), batch_size)
    plan = plan if max_batches < 0 else plan[:max_batches]
    return evaluate(model, (make_batch([data[index] for index in indices]) for indices in plan))
