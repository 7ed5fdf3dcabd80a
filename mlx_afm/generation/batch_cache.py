"""Keys and values of the rows of a batch: rows join, leave and grow without moving the others.

Every row begins at the first place of its storage and has its own length, so a row that joins, or refuses some of a
draft's tokens, moves nobody else. Shape suffixes: B rows, K key heads, R room (tokens), E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_afm.model import KVCache, Model
from mlx_afm.model.cache import Int8KVCache

ROOM_TOKENS = 256  # the smallest room; it doubles
ROW_BUCKETS = (1, 2, 4, 8, 16)


class BatchCache:
    """Storage of all full layers.

    Args:
        model: whose caches the rows bring.
        quantized: hold int8.
        padded_rows: keep storage for 1, 2, 4, 8, 16, ... rows, so that a compiled step sees few shapes. Rows behind the
            last are idle: they have length 0, and what is written there is never read.

    Attributes:
        keys, values: of each full layer, (B, K, R, E).
        lengths: tokens that each row holds.
    """

    def __init__(self, model: Model, *, quantized: bool = False, padded_rows: bool = False) -> None:
        self._model, self.quantized, self._padded = model, quantized, padded_rows
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of the storage, idle ones included."""
        return int(self.keys[0].shape[0]) if self.keys else 0

    @property
    def room(self) -> int:
        """Tokens that a row can hold."""
        return int(self.keys[0].shape[2]) if self.keys else 0

    @property
    def offsets(self) -> mx.array:
        """The lengths as an array of the host's, int32 (B,), idle rows included."""
        return mx.array(self.lengths + [0] * (self.rows - len(self)), mx.int32)

    def append(self, caches: Sequence[KVCache], length: int) -> None:
        """Takes a row: the first `length` tokens that caches of one row hold, which stay as they are."""
        self.reserve(length)
        room = max(self.room, room_for(length))
        count, rows, wanted = len(self), self.rows, self._row_count(len(self) + 1)
        for name in ("keys", "values"):
            held: list[mx.array] = getattr(self, name)
            for layer, cache in enumerate(caches):
                new = getattr(cache, name)[:, :, :length]
                if not count:
                    held[layer : layer + 1] = [_padded(new, wanted, room)]
                elif wanted > rows:
                    held[layer] = mx.concatenate([held[layer][:count], _padded(new, wanted - count, room)])
                else:
                    held[layer][count : count + 1, :, :length] = new
        self.lengths.append(length)

    def reserve(self, tokens: int) -> None:
        """Makes room for rows of so many tokens."""
        if not self.keys or tokens <= self.room:
            return
        room = room_for(tokens)
        self.keys = [_padded(array, self.rows, room) for array in self.keys]
        self.values = [_padded(array, self.rows, room) for array in self.values]

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        if list(rows) == list(range(len(self))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self.keys, self.values = [], []
            return
        count = self._row_count(len(rows))
        index = mx.array([*rows, *[rows[0]] * (count - len(rows))])
        self.keys, self.values = [array[index] for array in self.keys], [array[index] for array in self.values]

    def extract(self, row: int, length: int | None = None) -> list[KVCache]:
        """Caches of one row alone, with its first tokens or all; what the batch writes later they do not see."""
        length = self.lengths[row] if length is None else length
        caches = self._model.make_cache(quantized=self.quantized)
        for layer, cache in enumerate(caches):
            keys = mx.contiguous(self.keys[layer][row : row + 1, :, :length])
            values = mx.contiguous(self.values[layer][row : row + 1, :, :length])
            cache.state = keys, values, length
        return caches

    def steps(self) -> list[tuple[mx.array, mx.array] | None]:
        """Steps of each layer's key and value quantizers, if the storage is int8."""
        caches = self._model.make_cache(quantized=self.quantized)
        return [(cache.key_step, cache.value_step) if isinstance(cache, Int8KVCache) else None for cache in caches]

    def _row_count(self, rows: int) -> int:
        if not self._padded:
            return rows
        return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), -(-rows // ROW_BUCKETS[-1]) * ROW_BUCKETS[-1])


def room_for(tokens: int) -> int:
    """The room that holds so many tokens: 256, 512, 1024, ..."""
    room = ROOM_TOKENS
    while room < tokens:
        room *= 2
    return room


def _padded(array_BKSE: mx.array, rows: int, room: int) -> mx.array:
    """The array with idle rows and room behind."""
    batch, _, tokens, _ = array_BKSE.shape
    return mx.pad(array_BKSE, [(0, rows - batch), (0, 0), (0, room - tokens), (0, 0)])
