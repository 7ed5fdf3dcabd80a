"""Examples laid out in one row, each common beginning once, and who sees whom there. NumPy only.

The tokens of a row are a tree of prefixes in preorder: a token's continuations, of all examples that go on from it,
are the tokens right after it up to its last reader. So token j is visible to token i iff j <= i <= last_reader[j].

Shape suffixes: L tokens of a row, T targets, M queries, G groups of queries, Q queries of a group, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_afm.data.tokens import Tokens

Ints = npt.NDArray[np.int32]
ROW_STEP = 32  # lengths are rounded up to a multiple of this
KEY_STEP = 16  # and the number of keys to a multiple of this
GROUPS = (16, 32, 48, 64, 96, 128, 192, 256)  # queries of a group that are tried
KEY_COST = 32  # bringing a key to a group costs as much as this many queries that look at it


@dataclass(frozen=True)
class PackedRow:
    """Arrays of a row.

    Attributes:
        ids_L: int32, tokens read; padding at the end is zero.
        positions_L: int32, place of each token in its example.
        subtree_end_L: int32, index of the last token that sees this one; padding sees itself alone.
        needed_T: int32, ascending, the index whose prediction counts; twice if it has two targets.
        targets_T: int32.
        weights_T: float32, summed over the examples that train the same target behind the same tokens.

    Example: `a b x` and `a b c y`, all targets trained: ids `a b c`, last readers `2 2 2`, needed `0 1 1 2`, targets
    `b c x y`, weights `2 1 1 1`.
    """

    ids_L: Ints
    positions_L: Ints
    subtree_end_L: Ints
    needed_T: Ints
    targets_T: Ints
    weights_T: npt.NDArray[np.float32]


def common_tokens(first: Ints, second: Ints) -> int:
    """How many ids two examples have in common at their beginnings."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


def rounded_up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def pack(examples: Sequence[Tokens]) -> PackedRow:
    """The row of some examples, in the order of their ids."""
    ids, positions, needed, targets, weights = [], [], [], [], []
    subtree_end = np.zeros(sum(map(len, examples)), np.int32)
    path = read = np.empty(0, np.int32)
    count = 0
    for example in sorted(examples, key=lambda example: example.ids[:-1].tolist()):
        before, read = read, example.ids[:-1]
        shared = common_tokens(before, read)
        subtree_end[path[shared:]] = count - 1
        path = np.concatenate([path[:shared], np.arange(count, count + len(read) - shared, dtype=np.int32)])
        count += len(read) - shared
        ids.append(read[shared:])
        positions.append(np.arange(shared, len(read), dtype=np.int32))
        trained = np.flatnonzero(example.weights[1:])
        needed.append(path[trained])
        targets.append(example.ids[trained + 1])
        weights.append(example.weights[trained + 1])
    subtree_end[path] = count - 1
    length = rounded_up(count, ROW_STEP)
    padding = np.zeros(length - count, np.int32)
    return PackedRow(
        np.concatenate([*ids, padding]),
        np.concatenate([*positions, padding]),
        np.concatenate([subtree_end[:count], np.arange(count, length, dtype=np.int32)]),
        *_summed(np.concatenate(needed), np.concatenate(targets), np.concatenate(weights)),
    )


def _summed(
    needed: Ints, targets: Ints, weights: npt.NDArray[np.float32]
) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Equal targets at equal places become one, with the sum of their weights."""
    pairs, group = np.unique(np.stack([needed, targets]), axis=1, return_inverse=True)
    summed = np.bincount(group.reshape(-1), weights, pairs.shape[1]).astype(np.float32)
    return pairs[0], pairs[1], summed


def key_indices(queries_M: Ints, subtree_end_L: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Keys of each group of consecutive queries, int32 (G, S), and which of them each query sees, bool (G, Q, S).

    The size of the groups is the one that costs least. Keys are filled up with key 0, which then nobody sees.
    """
    count, places = len(queries_M), np.arange(len(subtree_end_L))
    visible_ML = (queries_M[:, None] >= places) & (queries_M[:, None] <= subtree_end_L)
    choices = [size for size in GROUPS if size < count and count % size == 0] + [count]
    seen = {size: visible_ML.reshape(-1, size, len(places)).any(axis=1) for size in choices}
    keys = {size: rounded_up(int(seen[size].sum(axis=1).max()), KEY_STEP) for size in choices}
    best = min(choices, key=lambda size: count // size * keys[size] * (size + KEY_COST))
    keys_GS = np.zeros((count // best, keys[best]), np.int32)
    mask_GQS = np.zeros((count // best, best, keys[best]), np.bool_)
    for group, seen_L in enumerate(seen[best].reshape(count // best, -1)):
        columns = np.flatnonzero(seen_L)
        keys_GS[group, : len(columns)] = columns
        mask_GQS[group, :, : len(columns)] = visible_ML[group * best : (group + 1) * best, columns]
    return keys_GS, mask_GQS
