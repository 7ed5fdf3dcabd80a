"""Settings of a training run, with their defaults and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_afm.errors import SettingError
from mlx_afm.training.distributed import TIMEOUT_SECONDS

SCHEDULES = ("cosine", "linear", "constant")
# The settings that `optimizer_config` may give to each optimizer, by the type of their values.
OPTIMIZERS: Mapping[str, Mapping[str, str]] = {
    "adamw": {"betas": "pair", "eps": "number", "bias_correction": "switch"},
    "adam": {"betas": "pair", "eps": "number", "bias_correction": "switch"},
    "sgd": {"momentum": "number", "dampening": "number", "nesterov": "switch"},
    "muon": {"momentum": "number", "nesterov": "switch", "ns_steps": "count"},
    "adafactor": {
        "eps": "pair",
        "clip_threshold": "number",
        "decay_rate": "number",
        "beta_1": "number",
        "scale_parameter": "switch",
    },
}
USUAL_DECAY = {"adamw": 0.01, "muon": 0.01}  # the others have none unless asked
MAX_TIMEOUT_SECONDS = 86400
NOT_DECAYED = ("norm.weight", ".m")  # norms, and DoRA's magnitudes: pulling them to zero is no regularisation


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast.

    Attributes:
        iters: optimizer steps; None to count in epochs.
        epochs: passes over the data, if `iters` is None.
        batch_size: examples per micro-batch.
        batch_tokens: instead of `batch_size`, micro-batches are rows filled with examples up to so many tokens, a
            common beginning counted once. What takes least time on data with a system prompt.
        grad_accumulation_steps: micro-batches per optimizer step; an epoch's last step takes what is left.
        learning_rate: its peak, reached after warm-up.
        warmup: steps over which the rate rises linearly, as a share of all steps if below 1, else as
            a number of steps; the first step is not zero.
        schedule: how the rate falls to zero after that: cosine, linear or constant (not at all).
        optimizer: adamw, adam, sgd, muon or adafactor, those of `mlx.optimizers`. Muon takes the
            matrices; what is not a matrix, and the embedding, is AdamW's.
        optimizer_config: its own settings, `betas`, `eps`, `momentum` and so on.
        weight_decay: on all trained tensors but `no_decay`; None for the optimizer's usual, 0.01 for
            adamw and muon and 0 for the others. Adam has none.
        no_decay: tensors whose name ends so are not decayed.
        rate_factors: end of a tensor's name -> factor of its learning rate (LoRA+: `lora_b` faster).
        clip_grad_norm: largest global norm of the gradient of the mean loss; 0 for no limit.
        max_skipped_steps: so many steps in a row without a finite gradient end the run.
        spike_sigmas: a step's loss this many deviations above the mean of the last `spike_window`
            steps is told as a spike; 0 for never.
        spike_window: how many steps.
        patience: evaluations in a row without a new best that end the run; 0 for never.
        steps_per_report, save_every: in optimizer steps.
        steps_per_eval: in optimizer steps; 0 for the end of each epoch. Also at both ends of the run.
        val_batches: batches per evaluation; -1 for all.
        seed: of adapters, data order and dropout.
        grad_checkpoint: keep one array per layer for the backward pass and compute the rest again: least memory,
            about a third more time.
        rank_timeout_seconds: how long one of several processes waits for the others before it ends the run.

    Raises:
        SettingError: settings out of range; all in one error.
    """

    iters: int | None = None
    epochs: int = 2
    batch_size: int = 4
    batch_tokens: int | None = None
    grad_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    optimizer: str = "adamw"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    no_decay: tuple[str, ...] = NOT_DECAYED
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    clip_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    spike_sigmas: float = 6.0
    spike_window: int = 100
    patience: int = 0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    val_batches: int = -1
    seed: int = 0
    grad_checkpoint: bool = False
    rank_timeout_seconds: float = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", USUAL_DECAY.get(self.optimizer, 0.0))
        faults = [*self._faults(), *self._optimizer_faults()]
        if faults:
            raise SettingError("training settings out of range", details=faults)

    @property
    def decay(self) -> float:
        """The weight decay, as it was resolved."""
        assert self.weight_decay is not None
        return self.weight_decay

    def _faults(self) -> Iterator[str]:
        counts = ("batch_size", "grad_accumulation_steps", "steps_per_report", "save_every", "max_skipped_steps")
        for name in (*counts, "spike_window", *(("epochs",) if self.iters is None else ("iters",))):
            if getattr(self, name) < 1:
                yield f"{name}: expected at least 1, found {getattr(self, name)}"
        if self.batch_tokens is not None and self.batch_tokens < 1:
            yield f"batch_tokens: expected at least 1, found {self.batch_tokens}"
        for name in ("steps_per_eval", "patience"):
            if getattr(self, name) < 0:
                yield f"{name}: expected at least 0, found {getattr(self, name)}"
        if not 0 < self.learning_rate < math.inf:
            yield f"learning_rate: expected a finite number above 0, found {self.learning_rate}"
        if not 0 <= self.warmup < math.inf or (self.warmup > 1 and self.warmup != int(self.warmup)):
            yield f"warmup: expected a share from 0 to below 1 or a whole number of steps, found {self.warmup}"
        for name in ("weight_decay", "clip_grad_norm", "spike_sigmas"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"{name}: expected a finite number from 0 on, found {getattr(self, name)}"
        if not 0 < self.rank_timeout_seconds <= MAX_TIMEOUT_SECONDS:
            found = self.rank_timeout_seconds
            yield f"rank_timeout_seconds: expected above 0, at most {MAX_TIMEOUT_SECONDS}, found {found}"
        for name, factor in self.rate_factors.items():
            if not 0 < factor < math.inf:
                yield f"rate_factors: expected a finite number above 0 for {name}, found {factor}"
        if not 0 <= self.seed < 1 << 63:
            yield f"seed: expected from 0 to 2^63 - 1, found {self.seed}"
        if self.val_batches < 1 and self.val_batches != -1:
            yield f"val_batches: expected at least 1, or -1 for all, found {self.val_batches}"
        if self.schedule not in SCHEDULES:
            yield f"schedule: expected one of {', '.join(SCHEDULES)}, found {self.schedule}"

    def _optimizer_faults(self) -> Iterator[str]:
        if self.optimizer not in OPTIMIZERS:
            yield f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {self.optimizer}"
            return
        kinds = OPTIMIZERS[self.optimizer]
        for name, value in self.optimizer_config.items():
            if name not in kinds:
                yield f"optimizer_config: {self.optimizer} takes {', '.join(kinds)}, found {name}"
            elif not _FITS[kinds[name]](value):
                yield f"optimizer_config: expected a {kinds[name]} for {name}, found {value!r}"
        if self.optimizer == "adam" and self.weight_decay:
            yield f"weight_decay: Adam has none (adamw has), found {self.weight_decay}"
        momentum, dampening = (self.optimizer_config.get(name, 0) for name in ("momentum", "dampening"))
        if self.optimizer == "sgd" and self.optimizer_config.get("nesterov") and (not momentum or dampening):
            yield "optimizer_config: nesterov needs momentum and no dampening"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "number": _is_number,
    "pair": lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)),
    "switch": lambda value: isinstance(value, bool),
    "count": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
}
