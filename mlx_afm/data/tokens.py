"""The last form of examples before batching: token ids and what each one is worth as a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

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
        removed_tokens: how many tokens overflow took away.
        dropped: examples that overflow left out.
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
