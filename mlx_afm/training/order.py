"""The order of the data: which examples each micro-batch of an epoch holds, from lengths, settings and seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_afm.data import Tokens, find_prefixes, plan_batches, plan_packed, require_fitting
from mlx_afm.training.config import TrainConfig


class DataOrder:
    """Plans of epochs over some data; the same for the same data, settings and seed.

    Args:
        data: encoded examples.
        config: `batch_size`, or `batch_tokens` to pack rows; `seed`; and what makes up a run.

    Raises:
        DataError: examples longer than `batch_tokens`, with their lines.
    """

    def __init__(self, data: Sequence[Tokens], config: TrainConfig) -> None:
        self._config, self._plan = config, (-1, list[tuple[int, ...]]())
        self._lengths = [len(tokens) for tokens in data]
        if config.batch_tokens is not None:
            require_fitting(self._lengths, lambda index: data[index].where, config.batch_tokens)
            self._prefixes = find_prefixes(data)

    def epoch(self, number: int) -> list[tuple[int, ...]]:
        """Indices of the examples of each micro-batch of an epoch."""
        if self._plan[0] != number:
            self._plan = (number, self._planned(number))
        return self._plan[1]

    def _planned(self, number: int) -> list[tuple[int, ...]]:
        config = self._config
        if config.batch_tokens is None:
            return plan_batches(self._lengths, config.batch_size, seed=config.seed, epoch=number)
        return plan_packed(self._prefixes, config.batch_tokens, seed=config.seed, epoch=number)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Cost: with `batch_tokens` and counted in epochs, the plans of all of them.
        """
        config = self._config
        if config.iters is not None:
            return config.iters
        if config.batch_tokens is None:
            batches = [math.ceil(len(self._lengths) / config.batch_size)] * config.epochs
        else:
            batches = [len(self._planned(number)) for number in range(config.epochs)]
        return sum(math.ceil(count / config.grad_accumulation_steps) for count in batches)
