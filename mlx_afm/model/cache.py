"""Keys and values of the tokens seen so far, one object per ordinary layer.

Layers that reuse keys and values have none; never count caches by `len(model.layers)`. The object
follows mlx-lm's cache protocol (`offset`, `update_and_fetch`, `make_mask`, `state`, `trim`), so
its generation loop drives it, and mlx-lm's own caches work in this model.

Shape suffixes: B batch, K key heads, L new tokens, S cached tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

STEP_TOKENS = 256  # storage grows by this many tokens


class KVCache:
    """Cache of one layer, for rows that may be padded on the left.

    Args:
        left_padding: how many padding tokens each row of the batch begins with; None for none.

    The first real token of every row has position 0, however much padding precedes it, and padding
    is visible to itself alone; a padded row therefore gives what the row alone would.
    """

    def __init__(self, left_padding: Sequence[int] | None = None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0
        self.left_padding = mx.array(list(left_padding)) if left_padding and any(left_padding) else None

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an integer, or (B,) with padding (negative inside it)."""
        return self.length if self.left_padding is None else self.length - self.left_padding

    def update_and_fetch(self, keys_BKLE: mx.array, values_BKLE: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values and returns all of them, each (B, K, S, E)."""
        start, end = self.length, self.length + keys_BKLE.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = _room_for(keys_BKLE, end), _room_for(values_BKLE, end)
        elif end > self.keys.shape[2]:
            self.keys = mx.concatenate([self.keys, _room_for(keys_BKLE, end - start)], axis=2)
            self.values = mx.concatenate([self.values, _room_for(values_BKLE, end - start)], axis=2)
        self.keys[..., start:end, :] = keys_BKLE
        self.values[..., start:end, :] = values_BKLE
        self.length = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Who is visible to `length` new tokens: None (all), "causal", or bool (B or 1, 1, L, S)."""
        if self.left_padding is None and not return_array:
            return None if length == 1 else "causal"
        columns = mx.arange(self.length + length)
        rows = mx.arange(self.length, self.length + length)[:, None]
        visible = rows >= columns
        if self.left_padding is None:
            return visible[None, None]
        padding = self.left_padding[:, None, None, None]
        return (visible & (columns >= padding)) | (rows == columns)

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        """Everything needed to continue; what mlx-lm evaluates and saves."""
        return self.keys, self.values, self.length

    @state.setter
    def state(self, value: tuple[mx.array | None, mx.array | None, int]) -> None:
        self.keys, self.values, self.length = value

    def is_trimmable(self) -> bool:
        """True: any number of the last tokens can be forgotten."""
        return True

    def trim(self, tokens: int) -> int:
        """Forgets the last tokens; returns how many it was."""
        tokens = min(tokens, self.length)
        self.length -= tokens
        return tokens

    def size(self) -> int:
        """Tokens held, padding included."""
        return self.length

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(array.nbytes for array in (self.keys, self.values) if array is not None)


def _room_for(array_BKLE: mx.array, tokens: int) -> mx.array:
    batch, heads, _, width = array_BKLE.shape
    steps = -(-tokens // STEP_TOKENS)
    return mx.zeros((batch, heads, steps * STEP_TOKENS, width), array_BKLE.dtype)
