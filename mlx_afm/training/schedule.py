"""The learning rate of a step: a pure function of the step."""

from __future__ import annotations

import math

from mlx_afm.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Rate of step `step` (counted from 0) of `total_steps`.

    Rises linearly to the peak over the warm-up, starting at one part of it and not at zero, so that
    the first step counts; then falls to (almost) zero at the last step.
    """
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
