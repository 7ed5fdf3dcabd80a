"""Signs that a run learns nothing: weights or losses that are not finite, and gradients that are exactly zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.checkpoints.finite import nonfinite_arrays
from mlx_afm.errors import ConfigError
from mlx_afm.tree import shorten

WATCHED_STEPS = 3  # the first update gives A its first gradient, since B starts at zero


class GradientWatch:
    """Finds trained tensors whose gradient is exactly zero in each of the first steps.

    Args:
        steps: how many steps to watch; with fewer than two nothing is known, since A has no gradient at first.

    Cost: one maximum per trained tensor and one evaluation, in the watched steps alone.
    """

    def __init__(self, steps: int) -> None:
        self._left = steps if steps > 1 else 0
        self._names: set[str] | None = None

    @property
    def watching(self) -> bool:
        """Whether the next step is to be watched."""
        return self._left > 0

    def add(self, gradients: Any) -> None:
        """Takes the gradients of one step, a tree of arrays."""
        largest = {name: mx.abs(array).max() for name, array in tree_flatten(gradients)}
        mx.eval(largest)
        zero = {name for name, value in largest.items() if value.item() == 0}
        self._names = zero if self._names is None else self._names & zero
        self._left -= 1

    def take(self) -> tuple[str, ...]:
        """The tensors found, once the last watched step is done; nothing before and afterwards."""
        if self._left or not self._names:
            return ()
        names, self._names = tuple(sorted(self._names)), None
        return names


def require_finite_weights(weights: Mapping[str, mx.array], step: int, saved: Mapping[str, int]) -> None:
    """Checks that a run has not ruined what it trains.

    Args:
        weights: the trained tensors.
        step: optimizer steps done.
        saved: what this run has saved, "last" or "best", and after which step.

    Raises:
        ConfigError: NaN or infinite values, with the names of the tensors.

    Cost: one sum per tensor and one evaluation.
    """
    counts = nonfinite_arrays(weights)
    if counts:
        details = shorten([f"{name}: {count} of {weights[name].size} values" for name, count in counts.items()], 10)
        what = f"{len(counts)} of {len(weights)} trained tensors are not finite"
        raise diverged(what, step, saved, details=details)


def diverged(what: str, step: int, saved: Mapping[str, int], *, details: list[str] | None = None) -> ConfigError:
    """The error that ends a run which diverged; it says what is still intact on disk."""
    kept = [f"{kind} of step {number}{'' if number else ' (not trained)'}" for kind, number in sorted(saved.items())]
    intact = f"Saved adapters are intact: {', '.join(kept)}." if kept else "No adapter was saved."
    advice = f"Lower --learning-rate; convert a float16 base to bfloat16. {intact}"
    return ConfigError(f"the training diverged at step {step}: {what}", advice=advice, details=details or ())
