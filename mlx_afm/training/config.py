"""Settings of a training run, with their defaults and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_afm.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast.

    Attributes:
        iters: optimizer steps; None to count in epochs.
        epochs: passes over the data, if `iters` is None.
        batch_size: examples per micro-batch.
        grad_accumulation_steps: micro-batches per optimizer step; an epoch's last step takes what is left.
        learning_rate: its peak, reached after warm-up.
        warmup: share of all steps over which the rate rises linearly; the first step is not zero.
        schedule: how the rate falls to zero after that: cosine, linear or constant (not at all).
        weight_decay: AdamW's, on all trained tensors.
        clip_grad_norm: largest global norm of the gradient of the mean loss; 0 for no limit.
        steps_per_report, steps_per_eval, save_every: in optimizer steps; evaluation also at both ends.
        val_batches: batches per evaluation; -1 for all.
        seed: of adapters, data order and dropout.

    Raises:
        ConfigError: settings out of range; all in one error.
    """

    iters: int | None = None
    epochs: int = 2
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    val_batches: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError("training settings out of range", details=faults)

    def _faults(self) -> Iterator[str]:
        counts = ("batch_size", "grad_accumulation_steps", "steps_per_report", "steps_per_eval", "save_every")
        for name in (*counts, *(("epochs",) if self.iters is None else ("iters",))):
            if getattr(self, name) < 1:
                yield f"{name}: expected at least 1, found {getattr(self, name)}"
        if not 0 < self.learning_rate < math.inf:
            yield f"learning_rate: expected a finite number above 0, found {self.learning_rate}"
        if not 0 <= self.warmup <= 1:
            yield f"warmup: expected a share from 0 to 1, found {self.warmup}"
        for name in ("weight_decay", "clip_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"{name}: expected a finite number from 0 on, found {getattr(self, name)}"
        if not 0 <= self.seed < 1 << 63:
            yield f"seed: expected from 0 to 2^63 - 1, found {self.seed}"
        if self.val_batches < 1 and self.val_batches != -1:
            yield f"val_batches: expected at least 1, or -1 for all, found {self.val_batches}"
        if self.schedule not in SCHEDULES:
            yield f"schedule: expected one of {', '.join(SCHEDULES)}, found {self.schedule}"
