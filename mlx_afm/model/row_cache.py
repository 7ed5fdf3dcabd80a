"""Keys and values of rows that each have their own length, in storage with fixed room, as a compiled step wants it.

Shape suffixes: B rows, K key heads, L new tokens, R room (tokens), E head width.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_afm.model.cache import from_int8, to_int8


class RowKVCache:
    """One layer's keys and values during one step; follows the protocol of `cache.KVCache` as far as the model uses it.

    Args:
        keys_BKRE, values_BKRE: storage, int8 if there are steps.
        offsets_B: int32, the tokens that each row holds. New ones are written behind them.
        steps: of the layer's key and value quantizers, float32 scalars; None holds the model's dtype.
        visible: tokens of the room that any row can hold after the step, if known: what lies behind is not read.

    Cost: one kernel each to write keys and values, in place where nothing else holds the storage. With int8 the whole
        room is made dense, one kernel each.
    """

    def __init__(
        self,
        keys_BKRE: mx.array,
        values_BKRE: mx.array,
        offsets_B: mx.array,
        *,
        steps: tuple[mx.array, mx.array] | None = None,
        visible: int | None = None,
    ) -> None:
        self.keys, self.values, self.offset = keys_BKRE, values_BKRE, offsets_B
        self._steps, self._visible = steps, visible

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Who is visible to `length` new tokens of each row: bool (B, 1, L, R)."""
        columns = mx.arange(self.keys.shape[2] if self._visible is None else self._visible)
        return columns <= self._places(length)[:, None, :, None]

    def update_and_fetch(self, keys_BKLE: mx.array, values_BKLE: mx.array) -> tuple[mx.array, mx.array]:
        """Writes keys and values behind those that each row holds, and returns the storage, dense."""
        places = self._places(keys_BKLE.shape[2])[:, None, :, None]
        dtype, steps = keys_BKLE.dtype, self._steps
        if steps is not None:
            keys_BKLE, values_BKLE = to_int8(keys_BKLE, steps[0]), to_int8(values_BKLE, steps[1])
        self.keys = mx.put_along_axis(self.keys, places, keys_BKLE, axis=2)
        self.values = mx.put_along_axis(self.values, places, values_BKLE, axis=2)
        keys, values = self.keys, self.values
        if self._visible is not None:
            keys, values = keys[:, :, : self._visible], values[:, :, : self._visible]
        if steps is None:
            return keys, values
        return from_int8(keys, steps[0], dtype), from_int8(values, steps[1], dtype)

    def _places(self, length: int) -> mx.array:
        """Where new tokens go, (B, L)."""
        places = self.offset[:, None]
        return places if length == 1 else places + mx.arange(length)
