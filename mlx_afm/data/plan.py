"""Which examples go together: pure functions of lengths and common beginnings, so (epoch, cursor) is a place."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mlx_afm.data.batches import Tokens
from mlx_afm.errors import ConfigError, DataError, SettingError

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


WINDOW_BATCHES = 32  # examples are sorted by length within this many batches
WINDOW_ROWS = 16  # rows that are filled at the same time
FULL = 0.99  # a row that is at least so full is closed
SHARING_STEP = 16  # a row that holds this many more of an example's tokens is preferred to a tighter one
MOST_FAULTS = 20  # named in an error


def plan_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Indices of the examples of each batch of an epoch; every example once, the last batch may be short.

    A pure function of its arguments, so a position in the data is (epoch, number of the batch).
    Shuffled, then sorted by length within windows of 32 batches (little padding), then the order of
    the batches is shuffled.

    Raises:
        ConfigError: batch_size below 1.
    """
    if batch_size < 1:
        raise SettingError("batch size below 1", found=batch_size)
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


def plan_packed(prefixes: Prefixes, batch_tokens: int, *, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Examples of each row of an epoch: at most `batch_tokens` tokens a row, each common beginning counted once.

    A pure function of its arguments. Examples are shuffled; rows are filled from a window of them, longest first,
    each example into the row that already holds most of it, among those into the tightest. Rows that are not full
    go back into the next window, and the order of the rows is shuffled.

    Raises:
        ConfigError: an example longer than a row; see `require_fitting` for the error that names the lines.
    Cost: half a second for 30,000 short examples.
    """
    lengths, ranks = prefixes.lengths.tolist(), prefixes.ranks.tolist()
    if lengths and max(lengths) > batch_tokens:
        raise ConfigError("an example is longer than a row", expected=f"at most {batch_tokens}", found=max(lengths))
    rng = np.random.default_rng([seed, epoch])
    left, rows = rng.permutation(len(lengths)).tolist(), list[SharedRow]()
    waiting: list[int] = []
    while left or waiting:
        window, left = _window(waiting, left, lengths, batch_tokens)
        filled = _fill(sorted(window, key=lambda index: -lengths[index]), prefixes, lengths, ranks, batch_tokens)
        closed = [row for row in filled if not left or row.tokens >= FULL * batch_tokens]
        closed = closed or filled  # whatever happens, a window leaves fewer examples than it took
        waiting = [index for row in filled if row not in closed for index in row.examples]
        rows += closed
    return [tuple(rows[index].examples) for index in rng.permutation(len(rows))]


def _window(waiting: list[int], left: list[int], lengths: list[int], batch_tokens: int) -> tuple[list[int], list[int]]:
    """The next examples to fill rows from, those waiting first; and what is left."""
    room = WINDOW_ROWS * batch_tokens - sum(lengths[index] for index in waiting)
    count = 0
    while count < len(left) and (room > 0 or not count):
        room -= lengths[left[count]]
        count += 1
    return waiting + left[:count], left[count:]


def _fill(window: list[int], prefixes: Prefixes, lengths: list[int], ranks: list[int], size: int) -> list[SharedRow]:
    rows: list[SharedRow] = []
    for example in window:
        best, best_key = None, (0, 0)
        for row in rows:
            shared = row.shared(ranks[example])
            room = size - row.tokens - lengths[example] + shared
            key = (-(shared // SHARING_STEP), room)
            if room >= 0 and (best is None or key < best_key):
                best, best_key = row, key
        if best is None:
            best = SharedRow(prefixes)
            rows.append(best)
        best.add(example, ranks[example], lengths[example] - best.shared(ranks[example]))
    return rows


def require_fitting(lengths: Sequence[int], where: Callable[[int], str], batch_tokens: int) -> None:
    """Refuses examples that are longer than a row.

    Args:
        lengths: tokens of each example, the last included.
        where: file and line of an example.
        batch_tokens: how many tokens are read in a row.

    Raises:
        DataError: which they are.
    """
    long = [index for index, length in enumerate(lengths) if length - 1 > batch_tokens]
    if long:
        details = [f"{where(index)}: {lengths[index] - 1} tokens" for index in long[:MOST_FAULTS]]
        details += [f"and {len(long) - MOST_FAULTS} more"] if len(long) > MOST_FAULTS else []
        advice = "Raise batch_tokens, or cut or drop long examples."
        raise DataError(
            f"{len(long)} example(s) longer than a row of {batch_tokens} tokens", details=details, advice=advice
        )
