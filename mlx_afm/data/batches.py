"""Tokens to arrays: a micro-batch is some examples, and lies in memory as costs least.

Shape suffixes: B batch, L tokens, N targets of the row that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_afm.data.packing import PackedRow, key_indices, pack, rounded_up
from mlx_afm.data.tokens import Tokens
from mlx_afm.model import KeyIndices, Packing

WORTH_PACKING = 0.97  # of the tokens of padded rows
TARGET_STEP = 16  # the number of targets of a packed row is rounded up to a multiple of this


@dataclass(frozen=True)
class Batch:
    """Arrays of one micro-batch.

    Attributes:
        inputs_BL: int32, tokens read, padded on the right.
        needed_BN: int32, the indices whose predictions count.
        targets_BN: int32, what should be predicted there.
        weights_BN: float32, weight of each target; 0 is padding.
        read_tokens: how many tokens the examples read, those in common counted for each.
        packing: how the examples share a row; None if each has its own.

    A padded input changes nothing before it, since a token sees no later token.

    Example: ids `a b c d`, weights `0 0 1 1` becomes inputs `a b c`, needed `1 2`, targets `c d`.
    """

    inputs_BL: mx.array
    needed_BN: mx.array
    targets_BN: mx.array
    weights_BN: mx.array
    read_tokens: int = 0
    packing: Packing | None = None


def make_batch(rows: Sequence[Tokens]) -> Batch:
    """The arrays of some examples: padded rows, or one packed row if that holds fewer tokens.

    Either way the loss is the sum of the examples' losses, and so is its gradient.
    """
    packed = pack(rows) if len(rows) > 1 else None
    if packed is None or len(packed.ids_L) > WORTH_PACKING * len(rows) * (max(map(len, rows)) - 1):
        return padded_batch(rows)
    return packed_batch(packed, read_tokens=_read_tokens(rows))


def padded_batch(rows: Sequence[Tokens]) -> Batch:
    """The arrays of some examples, one a row: inputs without the last token, targets shifted by one."""
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
    return Batch(mx.array(inputs), mx.array(needed), mx.array(targets), mx.array(weights), _read_tokens(rows))


def packed_batch(row: PackedRow, *, read_tokens: int) -> Batch:
    """The arrays of a packed row, a batch of one."""
    count = len(row.needed_T)
    fill = rounded_up(max(1, count), TARGET_STEP) - count
    needed = np.pad(row.needed_T, (0, fill), mode="edge" if count else "constant")
    everyone = key_indices(np.arange(len(row.ids_L), dtype=np.int32), row.subtree_end_L)
    packing = Packing(
        mx.array(row.positions_L[None]),
        KeyIndices(*map(mx.array, everyone)),
        KeyIndices(*map(mx.array, key_indices(needed, row.subtree_end_L))),
    )
    return Batch(
        inputs_BL=mx.array(row.ids_L[None]),
        needed_BN=mx.array(needed[None]),
        targets_BN=mx.array(np.pad(row.targets_T, (0, fill))[None]),
        weights_BN=mx.array(np.pad(row.weights_T, (0, fill))[None]),
        read_tokens=read_tokens,
        packing=packing,
    )


def _read_tokens(rows: Sequence[Tokens]) -> int:
    return sum(map(len, rows)) - len(rows)
