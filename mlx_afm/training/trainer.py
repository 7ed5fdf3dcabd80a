"""The training loop: steps, reports, evaluations, and when to save. It knows no files and no LoRA."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_afm.data import Batch, Tokens, make_batch
from mlx_afm.errors import ConfigError, DistributedError
from mlx_afm.model import Model
from mlx_afm.training.config import TrainConfig
from mlx_afm.training.distributed import ALONE, Ranks
from mlx_afm.training.events import (
    VALIDATION,
    Evaluated,
    LossSpiked,
    Sampled,
    StageProgress,
    StepsReported,
    TrainingFinished,
    TrainingInterrupted,
    TrainingResumed,
    TrainingStarted,
    ZeroGradientsFound,
)
from mlx_afm.training.health import WATCHED_STEPS, GradientWatch, diverged, require_finite_weights
from mlx_afm.training.hooks import Hooks
from mlx_afm.training.optimizers import GroupedOptimizer
from mlx_afm.training.order import DataOrder
from mlx_afm.training.schedule import learning_rate
from mlx_afm.training.state import Snapshot, TrainState, Window, random_state, set_random_state
from mlx_afm.training.step import (
    BatchOf,
    Loss,
    StepResult,
    batch_loss,
    evaluate_data,
    next_token_loss,
    require_float32,
    train_step,
)
from mlx_afm.tree import require_same_tensors


def train(
    model: Model,
    train_data: Sequence[Tokens],
    valid_data: Sequence[Tokens],
    config: TrainConfig,
    hooks: Hooks | None = None,
    *,
    resume: Snapshot | None = None,
    ranks: Ranks = ALONE,
    loss_of: Loss = batch_loss,
    batch_of: BatchOf = make_batch,
    score_of: Loss = next_token_loss,
) -> TrainState:
    """Trains whatever is trainable in the model, in place.

    Args:
        model: its trainable tensors must be float32; everything else is frozen.
        train_data, valid_data: encoded examples; without `valid_data` there is no best.
        config: see `TrainConfig`.
        hooks: who is told, who saves, who may stop the run.
        resume: a snapshot of a run with the same model, data and settings; the run then ends as if it
            had never been left, bit for bit on a device whose arithmetic repeats (the CPU's does).
        ranks: the processes that train this model together, each given the same; all but rank 0 are silent:
            of their hooks only `should_stop` is called, and all stop if one is asked to.
        loss_of: what the steps lower.
        score_of: what evaluations tell, and the best is told by.
        batch_of: makes the batch of some examples, for steps and evaluations; see `training.frozen`.

    Raises:
        ConfigError: nothing to train, or not float32, or no data; or the run diverged: trained tensors or the
            validation loss are not finite, `max_skipped_steps` steps in a row or most steps had no finite gradient.
            What was saved before is left as it is.
        TensorsError: a snapshot of another model. DistributedError: a rank was lost.
    """
    require_float32(model)
    if not train_data:
        raise ConfigError("no training examples")
    run = _Run(model, train_data, valid_data, config, hooks or Hooks(), ranks, loss_of, batch_of, score_of)
    if resume is None:
        mx.random.seed(config.seed)  # dropout draws from the default stream
    else:
        run.restore(resume)
    return run.all_steps()


class _Run:
    def __init__(
        self,
        model: Model,
        train_data: Sequence[Tokens],
        valid_data: Sequence[Tokens],
        config: TrainConfig,
        hooks: Hooks,
        ranks: Ranks,
        loss_of: Loss,
        batch_of: BatchOf,
        score_of: Loss,
    ) -> None:
        self.model, self.config, self.ranks, self.loss_of = model, config, ranks, loss_of
        self.batch_of, self.score_of = batch_of, score_of
        self.hooks = hooks if ranks.is_main_process else Hooks(should_stop=hooks.should_stop)
        self.train_data, self.valid_data = train_data, valid_data
        self.order = DataOrder(train_data, config)
        self.total_steps = self.order.total_steps
        self.optimizer = GroupedOptimizer(config, self.weights())
        self.state = TrainState()
        self.saved: dict[str, int] = {}  # "last" and "best": after which step
        self.gradients = GradientWatch(min(WATCHED_STEPS, self.total_steps))

    def weights(self) -> dict[str, mx.array]:
        """The trained tensors by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def snapshot(self) -> Snapshot:
        """The run as it stands."""
        return Snapshot(deepcopy(self.state), self.weights(), self.optimizer.arrays(), random_state())

    def restore(self, snapshot: Snapshot) -> None:
        """Puts a snapshot in place of what there is."""
        for found, expected in ((snapshot.weights, self.weights()), (snapshot.optimizer, self.optimizer.arrays())):
            require_same_tensors(
                {name: tuple(array.shape) for name, array in expected.items()},
                {name: tuple(array.shape) for name, array in found.items()},
                where="the state to resume from",
                advice="Was it saved with other settings?",
            )
        self.model.update(tree_unflatten(list(snapshot.weights.items())))
        self.optimizer.restore(snapshot.optimizer)
        self.state = deepcopy(snapshot.state)
        if self.state.step:
            self.saved = {"last": self.state.step}
            self.gradients = GradientWatch(0)
        if self.state.best_loss is not None:
            self.saved["best"] = self.state.best_step
        self.state.interrupted = False
        self.state.stopped_early = 0 < self.config.patience <= self.state.evaluations_without_best
        set_random_state(snapshot.random)

    def all_steps(self) -> TrainState:
        """Runs to the end, or until asked to stop: evaluate, then step, report, evaluate and save as configured."""
        if self.state.step == 0:
            self._start()
        else:
            self.hooks.on_event(
                TrainingResumed(step=self.state.step, total_steps=self.total_steps, best_loss=self.state.best_loss)
            )
        while not self._done:
            if self._asked_to_stop():
                return self._interrupt()
            self._one_step()
        self.model.eval()
        return self._finish()

    def _asked_to_stop(self) -> bool:
        with self._saved_if_a_rank_is_lost():
            return self.ranks.any(self.hooks.should_stop())

    @contextmanager
    def _saved_if_a_rank_is_lost(self) -> Iterator[None]:
        """Then the steps done are saved; of the one under way only the position in the data has moved."""
        before = deepcopy(self.state) if self.ranks.size > 1 else self.state
        try:
            yield
        except DistributedError:
            self.state = before
            self._save()
            raise

    @property
    def _done(self) -> bool:
        return self.state.step >= self.total_steps or self.state.stopped_early

    def _start(self) -> None:
        """State first: whatever happens from now on, there is one, and it is this run's."""
        self.state = TrainState()
        self.hooks.save_state(self.snapshot())
        self.hooks.on_event(
            TrainingStarted(
                total_steps=self.total_steps,
                trained_parameters=sum(array.size for array in self.weights().values()),
                examples=len(self.train_data),
                state_bytes=sum(array.nbytes for array in self.weights().values()) + self.optimizer.state_bytes,
            )
        )
        self._evaluate()

    def _one_step(self) -> None:
        config, state, epoch = self.config, self.state, self.state.epoch
        self.model.train()
        result = self._step()
        if state.step % config.steps_per_report == 0 or state.step == self.total_steps:
            self._report(epoch, result.gradient_norm)
        epoch_ended = state.cursor == 0
        due = state.step % config.steps_per_eval == 0 if config.steps_per_eval else epoch_ended
        if due or state.step == self.total_steps:
            self._evaluate()
            state.stopped_early = 0 < config.patience <= state.evaluations_without_best
            if state.stopped_early and state.window.steps:
                self._report(epoch, result.gradient_norm)
        if state.step % config.save_every == 0 and not self._done:
            self._save()

    def _step(self) -> StepResult:
        config, state, started = self.config, self.state, time.perf_counter()
        self.optimizer.set_learning_rate(learning_rate(config, state.step, self.total_steps))
        if self.ranks.size > 1:
            self.ranks.seed(config.seed, state.step)
        with self._saved_if_a_rank_is_lost():
            result = train_step(
                self.model,
                self.optimizer,
                self._next_batches(),
                clip_norm=config.clip_grad_norm,
                grad_checkpoint=config.grad_checkpoint,
                ranks=self.ranks,
                loss_of=self.loss_of,
                on_gradients=self.gradients.add if self.gradients.watching else None,
            )
        state.add(result, time.perf_counter() - started)
        if result.applied:
            self._watch_for_spike(result)
            self._tell_zero_gradients()
        else:
            self._require_recoverable()
        return result

    def _require_recoverable(self) -> None:
        """After a step without a finite gradient: one batch may cause that, ruined weights always do."""
        state = self.state
        self._require_finite()
        if state.skipped_in_a_row == self.config.max_skipped_steps:
            what = f"{state.skipped_in_a_row} steps in a row without a finite gradient"
            raise diverged(what, state.step, self.saved)

    def _require_finite(self) -> None:
        require_finite_weights(self.weights(), self.state.step, self.saved)

    def _require_finite_end(self) -> None:
        """Before the last save: without validation data nothing else looks at the model after the last step."""
        state, config = self.state, self.config
        if 2 * state.skipped >= state.step > 0:
            raise diverged(f"{state.skipped} of {state.step} steps had no finite gradient", state.step, self.saved)
        if not self.valid_data:
            first = [self.train_data[index] for index in range(min(config.batch_size, len(self.train_data)))]
            loss, _ = evaluate_data(self.model, first, config.batch_size, ranks=self.ranks, batch_of=self.batch_of)
            if not math.isfinite(loss):
                raise diverged(f"the loss of a training batch is {loss}", state.step, self.saved)

    def _tell_zero_gradients(self) -> None:
        if names := self.gradients.take():
            count = len(self.weights())
            self.hooks.on_event(ZeroGradientsFound(step=self.state.step, names=names, trained_tensors=count))

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of the next step; the position moves on at once, to where the step after it starts."""
        config, state = self.config, self.state
        plan = self.order.epoch(state.epoch)
        chosen = plan[state.cursor : state.cursor + config.grad_accumulation_steps]
        state.cursor += len(chosen)
        if state.cursor >= len(plan):
            state.epoch, state.cursor = state.epoch + 1, 0
        mine = self.order.share(chosen, self.ranks)
        return [self.batch_of([self.train_data[index] for index in indices]) for indices in mine]

    def _watch_for_spike(self, result: StepResult) -> None:
        loss = result.loss / result.tokens
        spike, mean = self.state.is_spike(loss, self.config.spike_sigmas, self.config.spike_window)
        if spike:
            self.hooks.on_event(
                LossSpiked(step=self.state.step, loss=loss, mean_before=mean, gradient_norm=result.gradient_norm)
            )

    def _report(self, epoch: int, gradient_norm: float) -> None:
        state, window = self.state, self.state.window
        left = self.total_steps - state.step
        self.hooks.on_event(
            StepsReported(
                step=state.step,
                total_steps=self.total_steps,
                epoch=epoch,
                loss=window.loss / window.tokens if window.tokens else math.nan,
                learning_rate=learning_rate(self.config, state.step - 1, self.total_steps),
                gradient_norm=gradient_norm,
                tokens_per_second=window.read_tokens / max(window.seconds, 1e-9),
                trained_tokens=round(state.trained_tokens),
                seconds_left=state.step_seconds / state.step * left,
                peak_memory_bytes=mx.get_peak_memory(),
                skipped_steps=state.skipped,
            )
        )
        state.window = Window()

    def _evaluate(self) -> None:
        if self.valid_data:
            self._score()
        if self.hooks.sample is not None:
            self._sample()

    def _score(self) -> None:
        state, started = self.state, time.perf_counter()
        config = self.config
        loss, tokens = evaluate_data(
            self.model,
            self.valid_data,
            config.batch_size,
            config.val_batches,
            ranks=self.ranks,
            on_batches=self._on_batches,
            batch_of=self.batch_of,
            score_of=self.score_of,
        )
        mean = loss / tokens
        if not math.isfinite(mean):
            raise diverged(f"the validation loss is {mean}", state.step, self.saved)
        state.last_loss, state.last_step = mean, state.step
        best = state.best_loss is None or mean < state.best_loss
        state.evaluations_without_best = 0 if best else state.evaluations_without_best + 1
        if best:
            state.best_loss, state.best_step = mean, state.step
            self._require_finite()
            self.hooks.save("best")
            self.saved["best"] = state.step
        elapsed = time.perf_counter() - started
        state.seconds += elapsed
        self.hooks.on_event(Evaluated(step=state.step, loss=mean, tokens=round(tokens), best=best, seconds=elapsed))

    def _on_batches(self, done: int, total: int) -> None:
        self.hooks.on_event(StageProgress(stage=VALIDATION, done=done, total=total, unit="batches"))

    def _sample(self) -> None:
        """Samples must not move the random numbers that dropout will draw."""
        assert self.hooks.sample is not None
        random = random_state()
        self.model.eval()
        for prompt, answer in self.hooks.sample():
            self.hooks.on_event(Sampled(step=self.state.step, prompt=prompt, answer=answer))
        set_random_state(random)

    def _save(self) -> None:
        """The state before the adapter: after a crash between them, resuming writes the adapter again."""
        self._require_finite()
        self.hooks.save_state(self.snapshot())
        self.hooks.save("last")
        self.saved["last"] = self.state.step

    def _interrupt(self) -> TrainState:
        self._save()
        self.model.eval()
        self.state.interrupted = True
        self.hooks.on_event(TrainingInterrupted(step=self.state.step, total_steps=self.total_steps))
        return self.state

    def _finish(self) -> TrainState:
        state = self.state
        self._require_finite_end()
        self._save()
        self.hooks.on_event(
            TrainingFinished(
                step=state.step,
                best_loss=state.best_loss,
                best_step=state.best_step,
                last_loss=state.loss_of_last,
                stopped_early=state.stopped_early,
                seconds=state.seconds,
            )
        )
        return state
