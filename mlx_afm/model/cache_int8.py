"""The cache in int8: what the model's own quantisers round keys and values to, and nothing else.

Attention passes keys and values that lie on the grid step * n, n from -128 to 127, rounded to the dtype of
the computation. Dividing by the step and rounding gives n back: that value is off by at most half a unit in
the last place, which is below a quarter of a step in bfloat16, whose 8 bits are the fewest. Multiplying again
is what the fake quantiser did, so attention sees the same bits.

Exact for every float32 and bfloat16 step in range; for float16 from 1.2e-7 up, where 128 steps still have a
spacing below half a step.

Shape suffixes: B batch, K key heads, L new tokens, S cached tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_afm.model.cache import KVCache


class Int8KVCache(KVCache):
    """Cache of one layer that holds int8.

    Args:
        key_step, value_step: steps of the layer's quantisers, float32 scalars.
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
    """The values of these numbers, multiplied in float32 and rounded once, as the fake quantiser does."""
    return (numbers.astype(mx.float32) * step).astype(dtype)
