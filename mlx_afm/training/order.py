"""The order of the data: which examples each micro-batch of an epoch holds, from lengths, settings and seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlx_afm.data import Tokens, find_prefixes, plan_batches, plan_packed, require_fitting
from mlx_afm.training.config import TrainConfig
from mlx_afm.training.distributed import Ranks, shard


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

    def share(self, batches: Sequence[tuple[int, ...]], ranks: Ranks) -> list[tuple[int, ...]]:
        """One rank's part of the micro-batches of a step.

        Examples are dealt in turn. Packed rows are dealt whole, and those left over cut into parts of about as
        many tokens, neighbours in the order of their ids staying together, so that they share what they can.
        """
        if self._config.batch_tokens is None or ranks.size == 1:
            return shard(batches, ranks)
        whole = len(batches) - len(batches) % ranks.size
        mine = [*batches[ranks.rank : whole : ranks.size], *(self._part(row, ranks) for row in batches[whole:])]
        return [row for row in mine if row]

    def _part(self, row: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
        ordered = np.array(sorted(row, key=lambda index: int(self._prefixes.ranks[index])))
        lengths = self._prefixes.lengths[ordered]
        ends = np.cumsum(lengths, dtype=np.int64)
        parts = np.minimum((2 * ends - lengths) * ranks.size // (2 * max(1, ends[-1])), ranks.size - 1)
        return tuple(ordered[parts == ranks.rank].tolist())

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
