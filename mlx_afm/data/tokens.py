"""The last form of an example before batching: token ids and what each one is worth as a target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
