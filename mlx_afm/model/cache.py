"""Keys and values of the tokens seen so far, one object per ordinary layer.

Layers that reuse keys and values have none; never count caches by `len(model.layers)`. The object
follows mlx-lm's cache protocol (`offset`, `update_and_fetch`, `make_mask`, `state`, `trim`, and those of
its batches: `merge`, `extend`, `filter`, `extract`, `prepare`, `finalize`), so its generation loops drive
it, and mlx-lm's own caches work in this model.

The cache in int8 keeps what the model's own quantizers round keys and values to, and nothing else.

Attention passes keys and values that lie on the grid step * n, n from -128 to 127, rounded to the dtype of
the computation. Dividing by the step and rounding gives n back: that value is off by at most half a unit in
the last place, which is below a quarter of a step in bfloat16, whose 8 bits are the fewest. Multiplying again
is what the fake quantizer did, so attention sees the same bits.

Exact for every float32 and bfloat16 step in range; for float16 from 1.2e-7 up, where 128 steps still have a
spacing below half a step.

Shape suffixes: B batch, K key heads, L new tokens, S cached tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import mlx.core as mx

from mlx_afm.errors import ConfigError

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
        self._padding: list[int] = []  # empty: no row has any
        self._right_padding: list[int] = []
        self._set_padding([] if left_padding is None else left_padding)

    def _set_padding(self, padding: Sequence[int]) -> None:
        self._padding = list(padding) if any(padding) else []
        self.left_padding = mx.array(self._padding) if self._padding else None

    def _like(self) -> KVCache:
        """An empty cache of the same kind."""
        return KVCache()

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

    def copy(self, tokens: int | None = None) -> KVCache:
        """A cache with the first tokens of this one, or all; what either stores afterwards the other does not see.

        Cost: nothing until tokens are appended; then the copied ones are written anew.
        """
        other = self._like()
        other._set_padding(self._padding)
        if self.keys is not None and self.values is not None:
            other.length = self.length if tokens is None else min(tokens, self.length)
            other.keys, other.values = self.keys[..., : other.length, :], self.values[..., : other.length, :]
        return other

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> KVCache:
        """One cache with the rows of all, in order; shorter ones get padding on the left.

        Raises:
            ConfigError: some are empty and others not.
        """
        merged = caches[0].copy()
        if len(caches) > 1:
            merged._join(caches)
        return merged

    def extend(self, other: KVCache) -> None:
        """Appends the rows of another cache; see `merge`."""
        self._join([self, other])

    def _join(self, caches: Sequence[KVCache]) -> None:
        held = [cache for cache in caches if cache.keys is not None]
        if not held:
            paddings = [cache._padding for cache in caches]
            if any(paddings) and not all(paddings):
                raise ConfigError("caches without tokens say how many rows they have by their padding alone")
            self._set_padding(list(chain.from_iterable(paddings)))
            return
        if len(held) < len(caches):
            raise ConfigError("caches with tokens and caches without cannot be one batch")
        longest = max(cache.length for cache in held)
        padding: list[int] = []
        for cache in held:
            own = cache._padding or [0] * cache._rows
            padding += [longest - cache.length + count for count in own]
        self.keys = mx.concatenate([_right_aligned(cache.keys, cache.length, longest) for cache in held])
        self.values = mx.concatenate([_right_aligned(cache.values, cache.length, longest) for cache in held])
        self.length = longest
        self._set_padding(padding)

    @property
    def _rows(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[0])

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keeps these rows, in this order; padding that no row needs any more goes."""
        kept: list[int] = batch_indices.tolist() if isinstance(batch_indices, mx.array) else list(batch_indices)  # type: ignore[assignment]
        padding = [self._padding[index] for index in kept] if self._padding else []
        surplus = 0
        if self.keys is not None and self.values is not None:
            surplus = min(padding, default=0)
            rows = mx.array(kept, mx.int32)
            self.keys, self.values = self.keys[rows][:, :, surplus:], self.values[rows][:, :, surplus:]
            self.length -= surplus
        self._set_padding([count - surplus for count in padding])

    def extract(self, index: int) -> KVCache:
        """The cache of one row alone, without padding."""
        row = self._like()
        if self.keys is not None and self.values is not None:
            start = self._padding[index] if self._padding else 0
            row.keys = mx.contiguous(self.keys[index : index + 1, :, start : self.length])
            row.values = mx.contiguous(self.values[index : index + 1, :, start : self.length])
            row.length = self.length - start
        return row

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announces padding of the tokens that come next, as mlx-lm's batches do; `lengths` say the same.

        Padding on the right is moved to the left by `finalize`, before any token follows it.

        Raises:
            ConfigError: padding on the left of tokens that follow others.
        """
        if left_padding is not None and any(left_padding):
            if self.keys is not None:
                raise ConfigError("padding on the left comes before the first token")
            own = self._padding or [0] * len(left_padding)
            self._set_padding([a + b for a, b in zip(own, left_padding)])
        if right_padding is not None and any(right_padding):
            self._right_padding = list(right_padding)

    def finalize(self) -> None:
        """Moves what was announced as padding on the right to the left."""
        moved, self._right_padding = self._right_padding, []
        if not moved or self.keys is None or self.values is None:
            return
        sources = (mx.arange(self.length) - mx.array(moved)[:, None]) % self.length
        index = sources[:, None, :, None]
        self.keys = mx.take_along_axis(self.keys[..., : self.length, :], index, axis=2)
        self.values = mx.take_along_axis(self.values[..., : self.length, :], index, axis=2)
        own = self._padding or [0] * len(moved)
        self._set_padding([a + b for a, b in zip(own, moved)])

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


def _right_aligned(array_BKSE: mx.array | None, length: int, longest: int) -> mx.array:
    """The tokens held, with padding on the left up to `longest` and room for more on the right."""
    assert array_BKSE is not None
    room = -longest % STEP_TOKENS
    return mx.pad(array_BKSE[..., :length, :], [(0, 0), (0, 0), (longest - length, room), (0, 0)])


class Int8KVCache(KVCache):
    """Cache of one layer that holds int8.

    Args:
        key_step, value_step: steps of the layer's quantizers, float32 scalars.
        left_padding: how many padding tokens each row of the batch begins with; None for none.

    Cost: a quarter of a float32 cache, half of a 16-bit one; each call makes one layer's keys and values
    in the dtype of the computation.
    """

    def __init__(self, key_step: mx.array, value_step: mx.array, left_padding: Sequence[int] | None = None) -> None:
        super().__init__(left_padding)
        self.key_step, self.value_step = key_step, value_step

    def _like(self) -> KVCache:
        return Int8KVCache(self.key_step, self.value_step)

    def update_and_fetch(self, keys_BKLE: mx.array, values_BKLE: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values, which lie on the grid, and returns all of them, each (B, K, S, E)."""
        dtype = keys_BKLE.dtype
        numbers = super().update_and_fetch(to_int8(keys_BKLE, self.key_step), to_int8(values_BKLE, self.value_step))
        return from_int8(numbers[0], self.key_step, dtype), from_int8(numbers[1], self.value_step, dtype)


def to_int8(x: mx.array, step: mx.array) -> mx.array:
    """The numbers n of values step * n."""
    return mx.round(x.astype(mx.float32) / step).astype(mx.int8)


def from_int8(numbers: mx.array, step: mx.array, dtype: mx.Dtype) -> mx.array:
    """The values of these numbers, multiplied in float32 and rounded once, as the fake quantizer does."""
    return (numbers.astype(mx.float32) * step).astype(dtype)
