"""Tokens to arrays: a micro-batch is some examples, and lies in memory as costs least.

Shape suffixes: B batch, L tokens, N targets of the row that has most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.model import Activations, KeyIndices, Packing

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
        output_positions_T: int32, ascending, the index whose prediction counts; twice if it has two targets.
        targets_T: int32.
        weights_T: float32, summed over the examples that train the same target behind the same tokens.
        places: of each example, in the order given, int32 (T,), the index in the row of each token that it reads.

    Example: `a b x` and `a b c y`, all targets trained: ids `a b c`, subtree ends `2 2 2`, output positions
    `0 1 1 2`, targets `b c x y`, weights `2 1 1 1`.
    """

    ids_L: Ints
    positions_L: Ints
    subtree_end_L: Ints
    output_positions_T: Ints
    targets_T: Ints
    weights_T: npt.NDArray[np.float32]
    places: tuple[Ints, ...]


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
    ids, positions, outputs, targets, weights = [], [], [], [], []
    subtree_end = np.zeros(sum(map(len, examples)), np.int32)
    path = read = np.empty(0, np.int32)
    count, places = 0, [read] * len(examples)
    for index in sorted(range(len(examples)), key=lambda index: examples[index].ids[:-1].tolist()):
        example = examples[index]
        before, read = read, example.ids[:-1]
        shared = common_tokens(before, read)
        subtree_end[path[shared:]] = count - 1
        path = np.concatenate([path[:shared], np.arange(count, count + len(read) - shared, dtype=np.int32)])
        count += len(read) - shared
        places[index] = path
        ids.append(read[shared:])
        positions.append(np.arange(shared, len(read), dtype=np.int32))
        trained = np.flatnonzero(example.weights[1:])
        outputs.append(path[trained])
        targets.append(example.ids[trained + 1])
        weights.append(example.weights[trained + 1])
    subtree_end[path] = count - 1
    length = rounded_up(count, ROW_STEP)
    padding = np.zeros(length - count, np.int32)
    return PackedRow(
        np.concatenate([*ids, padding]),
        np.concatenate([*positions, padding]),
        np.concatenate([subtree_end[:count], np.arange(count, length, dtype=np.int32)]),
        *_summed(np.concatenate(outputs), np.concatenate(targets), np.concatenate(weights)),
        tuple(places),
    )


def _summed(
    outputs: Ints, targets: Ints, weights: npt.NDArray[np.float32]
) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Equal targets at equal places become one, with the sum of their weights."""
    pairs, group = np.unique(np.stack([outputs, targets]), axis=1, return_inverse=True)
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


Weights = npt.NDArray[np.bool_] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tokens:
    """One encoded example.

    Attributes:
        ids: int32 (L,).
        weights: float32 (L,), weight of each token *as a target*; 0 for tokens that are only read.
            weights[t] belongs to ids[t]; the shift by one happens in `make_batch` and nowhere else.
        where: file and line it came from.

    Example: ids `</s> hi <turn_end>`, weights `0 1 1` trains the prediction of `hi` after `</s>` and
    of `<turn_end>` after `hi`.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that are targets."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class TokenTable(Sequence[Tokens]):
    """All examples of a split in four arrays, which may lie on disk; items are `Tokens`.

    Attributes:
        files: names of the files they came from.
        ids: int32 (N,), the ids of all examples, one after the other.
        weights: of each as a target; bool (N,) if every weight is 0 or 1, else float32 (N,).
        starts: int64 (examples + 1,), where each example starts; the last is N.
        places: int64 (examples, 2), file (index into `files`) and line of each.
        removed_tokens: how many tokens truncation took away.
        dropped: examples that truncation left out.
    """

    files: tuple[str, ...]
    ids: npt.NDArray[np.int32]
    weights: Weights
    starts: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    removed_tokens: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        """One example, or a list of them."""
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        piece = slice(self.starts[index], self.starts[index + 1])
        file, line = self.places[index]
        return Tokens(
            np.asarray(self.ids[piece]), self.weights[piece].astype(np.float32), f"{self.files[file]} line {line}"
        )

    def __iter__(self) -> Iterator[Tokens]:
        return (self[index] for index in range(len(self)))

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Which ids are targets, bool (N,)."""
        return self.weights > 0

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.starts)


WORTH_PACKING = 0.97  # of the tokens of padded rows
TARGET_STEP = 16  # the number of targets of a packed row is rounded up to a multiple of this


@dataclass(frozen=True)
class Batch:
    """Arrays of one micro-batch.

    Attributes:
        inputs_BL: int32, tokens read, padded on the right.
        output_positions_BN: int32, the indices whose predictions count.
        targets_BN: int32, what should be predicted there.
        weights_BN: float32, weight of each target; 0 is padding.
        read_tokens: how many tokens the examples read, those in common counted for each.
        packing: how the examples share a row; None if each has its own.
        rows: the examples.
        places: of each example, int32 (T,), the index into B * L of each token that it reads.
        activations: of frozen layers, if they are not to be computed; see `training.frozen`.

    A padded input changes nothing before it, since a token sees no later token.

    Example: ids `a b c d`, weights `0 0 1 1` becomes inputs `a b c`, output positions `1 2`, targets `c d`.
    """

    inputs_BL: mx.array
    output_positions_BN: mx.array
    targets_BN: mx.array
    weights_BN: mx.array
    read_tokens: int = 0
    packing: Packing | None = None
    rows: Sequence[Tokens] = ()
    places: Sequence[Ints] = ()
    activations: Activations | None = None


def make_batch(rows: Sequence[Tokens], *, by_outputs: bool = False) -> Batch:
    """The arrays of some examples: padded rows, or one packed row if that holds fewer tokens.

    Either way the loss is the sum of the examples' losses, and so is its gradient.

    Args:
        rows: the examples.
        by_outputs: compare the numbers of output positions, for layers that compute nothing else.
    """
    packed = pack(rows) if len(rows) > 1 else None
    if packed is None or not _is_smaller(packed, rows, by_outputs):
        return padded_batch(rows)
    return replace(packed_batch(packed, read_tokens=_read_tokens(rows)), rows=rows, places=packed.places)


def _is_smaller(packed: PackedRow, rows: Sequence[Tokens], by_outputs: bool) -> bool:
    """Whether a packed row is worth it beside padded ones."""
    if by_outputs:
        most = max(int(np.count_nonzero(row.weights[1:])) for row in rows)
        return rounded_up(len(packed.output_positions_T), TARGET_STEP) <= WORTH_PACKING * len(rows) * most
    return len(packed.ids_L) <= WORTH_PACKING * len(rows) * (max(map(len, rows)) - 1)


def padded_batch(rows: Sequence[Tokens]) -> Batch:
    """The arrays of some examples, one a row: inputs without the last token, targets shifted by one."""
    length = max(len(row) for row in rows) - 1
    width = max(1, max(int(np.count_nonzero(row.weights[1:])) for row in rows))
    inputs = np.zeros((len(rows), length), np.int32)
    outputs = np.zeros((len(rows), width), np.int32)
    targets = np.zeros((len(rows), width), np.int32)
    weights = np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = row.ids[:-1]
        trained = np.flatnonzero(row.weights[1:])
        outputs[index, : len(trained)] = trained
        targets[index, : len(trained)] = row.ids[trained + 1]
        weights[index, : len(trained)] = row.weights[trained + 1]
    return Batch(
        mx.array(inputs),
        mx.array(outputs),
        mx.array(targets),
        mx.array(weights),
        read_tokens=_read_tokens(rows),
        rows=rows,
        places=[np.arange(len(row) - 1, dtype=np.int32) + index * length for index, row in enumerate(rows)],
    )


def packed_batch(row: PackedRow, *, read_tokens: int) -> Batch:
    """The arrays of a packed row, a batch of one."""
    count = len(row.output_positions_T)
    fill = rounded_up(max(1, count), TARGET_STEP) - count
    outputs = np.pad(row.output_positions_T, (0, fill), mode="edge" if count else "constant")
    everyone = key_indices(np.arange(len(row.ids_L), dtype=np.int32), row.subtree_end_L)
    packing = Packing(
        mx.array(row.positions_L[None]),
        KeyIndices(*map(mx.array, everyone)),
        KeyIndices(*map(mx.array, key_indices(outputs, row.subtree_end_L))),
    )
    return Batch(
        inputs_BL=mx.array(row.ids_L[None]),
        output_positions_BN=mx.array(outputs[None]),
        targets_BN=mx.array(np.pad(row.targets_T, (0, fill))[None]),
        weights_BN=mx.array(np.pad(row.weights_T, (0, fill))[None]),
        read_tokens=read_tokens,
        packing=packing,
    )


def _read_tokens(rows: Sequence[Tokens]) -> int:
    return sum(map(len, rows)) - len(rows)
