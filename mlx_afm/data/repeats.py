"""Examples that stand in the data more than once, found by their fingerprints.

Arrays rather than a dict: 12 bytes an example, and 8 more while they are compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Chunk:
    first: int  # number of its first example in the split
    file: int
    lines: npt.NDArray[np.uint32]
    prints: Int64


@dataclass
class Fingerprints:
    """Fingerprints of the examples of one split, in order, with their places."""

    _chunks: list[_Chunk] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    def add(self, file: int, lines: Int64, prints: Int64) -> None:
        """Some examples of a file, after those before."""
        if len(lines):
            self._chunks.append(_Chunk(self._count, file, lines.astype(np.uint32), prints.copy()))
            self._starts.append(self._count)
            self._count += len(lines)

    def place(self, index: int) -> tuple[int, int]:
        """File and line of an example."""
        chunk = self._chunks[bisect_right(self._starts, index) - 1]
        return chunk.file, int(chunk.lines[index - chunk.first])

    def places(self, indices: Int64) -> list[tuple[int, int]]:
        """Files and lines of some examples."""
        return [self.place(index) for index in indices.tolist()]

    def sorted(self) -> Int64:
        """All fingerprints in order of size."""
        prints = np.concatenate([chunk.prints for chunk in self._chunks] or [np.zeros(0, np.int64)])
        prints.sort()
        return prints

    def first_of(self, wanted: Int64) -> Int64:
        """The first example with each of some fingerprints (sorted, each once); -1 where there is none."""
        first = np.full(len(wanted), -1, np.int64)
        for chunk in reversed(self._chunks):
            places, known = _look_up(wanted, chunk.prints)
            indices = chunk.first + np.flatnonzero(known)
            first[places[known][::-1]] = indices[::-1]  # of several the last assignment stays: the earliest
        return first

    def with_prints(self, wanted: Int64) -> Iterator[tuple[Int64, Int64]]:
        """The examples that have one of some fingerprints: their numbers, and which of `wanted` it is."""
        for chunk in self._chunks:
            places, known = _look_up(wanted, chunk.prints)
            if known.any():
                yield chunk.first + np.flatnonzero(known), places[known]


def find_duplicates(split: Fingerprints) -> Iterator[tuple[Int64, Int64]]:
    """Examples that are the same as an earlier one: their numbers, and the number of the first of each."""
    ordered = split.sorted()
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    first = split.first_of(repeated)
    for examples, which in split.with_prints(repeated):
        later = examples != first[which]
        if later.any():
            yield examples[later], first[which[later]]


def find_overlap(split: Fingerprints, other: Fingerprints) -> Iterator[tuple[Int64, Int64]]:
    """Examples of `split` that are in `other` too: their numbers, and the number of the first there."""
    wanted = np.unique(split.sorted())
    first = other.first_of(wanted)
    for examples, which in split.with_prints(wanted[first >= 0]):
        yield examples, first[first >= 0][which]


def _look_up(wanted: Int64, prints: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Where each fingerprint stands in `wanted`, and whether it does."""
    if not len(wanted):
        return np.zeros(len(prints), np.int64), np.zeros(len(prints), np.bool_)
    places = np.minimum(np.searchsorted(wanted, prints), len(wanted) - 1)
    return places, wanted[places] == prints
