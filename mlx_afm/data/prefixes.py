"""What examples have in common at their beginnings, found once for a data set.

Sorted by their ids, examples with a common beginning are neighbours, and any two of them share as many
tokens as the least that neighbours between them do.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mlx_afm.data.tokens import Tokens

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Prefixes:
    """Lengths of examples and how many tokens any two share; lengths count the tokens read, without the last.

    Attributes:
        lengths: int32 (N,).
        ranks: int32 (N,), place of each example among all in the order of their ids.
        shared: int32 (levels, N - 1): row k, column i is the least that neighbours share from rank i
            over 2^k pairs.

    Example: `a b c x`, `a d x`, `a b x` read `a b c`, `a d`, `a b`: ranks 1, 2, 0, and neighbours share 2, 1.
    """

    lengths: Ints
    ranks: Ints
    shared: tuple[list[int], ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def between(self, low: int, high: int) -> int:
        """How many tokens the examples of two ranks share, low < high."""
        level = (high - low).bit_length() - 1
        row = self.shared[level]
        return min(row[low], row[high - (1 << level)])


class SharedRow:
    """Examples that share a row: how many tokens it holds when each common beginning is there once."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.tokens = 0
        self.examples: list[int] = []
        self._prefixes, self._ranks = prefixes, list[int]()

    def shared(self, rank: int) -> int:
        """How many tokens of the example of a rank the row holds already."""
        place, most = bisect_left(self._ranks, rank), 0
        if place:
            most = self._prefixes.between(self._ranks[place - 1], rank)
        if place < len(self._ranks):
            most = max(most, self._prefixes.between(rank, self._ranks[place]))
        return most

    def add(self, example: int, rank: int, tokens: int) -> None:
        """Adds an example that takes `tokens` more."""
        insort(self._ranks, rank)
        self.examples.append(example)
        self.tokens += tokens


def find_prefixes(data: Iterable[Tokens]) -> Prefixes:
    """Lengths and common beginnings of all examples.

    Cost: a second for 30,000 short examples; the ids of all of them are in memory meanwhile.
    """
    keys = [tokens.ids[:-1].astype(">i4").tobytes() for tokens in data]  # sorted as bytes = sorted as ids
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ranks = np.empty(len(keys), np.int32)
    ranks[order] = np.arange(len(keys), dtype=np.int32)
    neighbours = [_common(keys[first], keys[second]) for first, second in pairwise(order)]
    lengths = np.array([len(key) // 4 for key in keys], np.int32)
    return Prefixes(lengths, ranks, tuple(row.tolist() for row in _least(np.array(neighbours, np.int32))))


def _common(first: bytes, second: bytes) -> int:
    """How many ids two keys have in common at their beginnings."""
    size = min(len(first), len(second)) // 4
    different = np.frombuffer(first, np.int32, size) != np.frombuffer(second, np.int32, size)
    place = int(different.argmax()) if size else 0
    return place if size and different[place] else size


def _least(row: Ints) -> list[Ints]:
    """Rows of the least of 1, 2, 4, ... consecutive numbers."""
    rows, width = [row], 1
    while 2 * width <= len(row):
        rows.append(np.minimum(rows[-1][:-width], rows[-1][width:]))
        width *= 2
    return rows
