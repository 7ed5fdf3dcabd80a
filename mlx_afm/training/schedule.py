"""The learning rate of a step: a pure function of the step."""

from __future__ import annotations

import math

from mlx_afm.training.config import TrainConfig


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the warm-up: a share of all steps below 1, else a number of steps."""
    return round(config.warmup * total_steps) if config.warmup < 1 else min(int(config.warmup), total_steps)


def depends_on_length(config: TrainConfig) -> bool:
    """Whether the rate of a step depends on how many steps there will be."""
    return config.schedule != "constant" or 0 < config.warmup < 1


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Rate of step `step` (counted from 0) of `total_steps`.

    Rises linearly to the peak over the warm-up, starting at one part of it and not at zero, so that
    the first step counts; then falls to (almost) zero at the last step.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup if config.warmup < 1 else config.warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
