"""Tokens to batches: which examples go together is planned from lengths alone, then arrays are made.

Shape suffixes: B batch, L tokens, N targets of the row that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_afm.data.tokens import Tokens
from mlx_afm.errors import ConfigError

WINDOW_BATCHES = 32  # examples are sorted by length within this many batches


@dataclass(frozen=True)
class Batch:
    """Arrays of one micro-batch, padded on the right.

    Attributes:
        inputs_BL: int32, tokens read.
        needed_BN: int32, the indices whose predictions count.
        targets_BN: int32, what should be predicted there.
        weights_BN: float32, weight of each target; 0 is padding.
        read_tokens: how many inputs are not padding.

    A padded input changes nothing before it, since a token sees no later token.

    Example: ids `a b c d`, weights `0 0 1 1` becomes inputs `a b c`, needed `1 2`, targets `c d`.
    """

    inputs_BL: mx.array
    needed_BN: mx.array
    targets_BN: mx.array
    weights_BN: mx.array
    read_tokens: int = 0


def plan_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Indices of the examples of each batch of an epoch; every example once, the last batch may be short.

    A pure function of its arguments, so a position in the data is (epoch, number of the batch).
    Shuffled, then sorted by length within windows of 32 batches (little padding), then the order of
    the batches is shuffled.

    Raises:
        ConfigError: batch_size below 1.
    """
    if batch_size < 1:
        raise ConfigError("batch size below 1", found=batch_size)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = batch_size * WINDOW_BATCHES
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), window):
        piece = sorted(order[start : start + window].tolist(), key=lambda index: lengths[index])
        batches += [tuple(piece[first : first + batch_size]) for first in range(0, len(piece), batch_size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def plan_in_order(count: int, batch_size: int) -> list[tuple[int, ...]]:
    """Batches of the examples as they come, for evaluation."""
    return [tuple(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


def make_batch(rows: Sequence[Tokens]) -> Batch:
    """The arrays of some examples: inputs without the last token, targets shifted by one."""
    length = max(len(row) for row in rows) - 1
    width = max(1, max(int(np.count_nonzero(row.weights[1:])) for row in rows))
    inputs = np.zeros((len(rows), length), np.int32)
    needed = np.zeros((len(rows), width), np.int32)
    targets = np.zeros((len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = row.ids[:-1]
        trained = np.flatnonzero(row.weights[1:])
        needed[index, : len(trained)] = trained
        targets[index, : len(trained)] = row.ids[trained + 1]
        weights[index, : len(trained)] = row.weights[trained + 1]
    return Batch(
        mx.array(inputs), mx.array(needed), mx.array(targets), mx.array(weights), sum(map(len, rows)) - len(rows)
    )
