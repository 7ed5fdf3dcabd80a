"""Keys and values of beginnings that prompts share: the system message, tools included, and a conversation so far.

Where a prompt is cut follows from its own turns alone, and it is always computed from cut to cut, whether a part of it
is held or not. So an answer is the same to the last bit either way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import mlx.core as mx

from mlx_afm.model.cache import KVCache

Key = tuple[str | None, tuple[int, ...]]


class PrefixCache:
    """The least recently used beginnings leave when there are too many bytes.

    Args:
        limit_bytes: of all of them; 0 holds none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self.hits = self.misses = 0
        self._held: OrderedDict[Key, list[tuple[mx.array, mx.array]]] = OrderedDict()

    def restore(self, adapter: str | None, ids: Sequence[int], cuts: Sequence[int], caches: Sequence[KVCache]) -> int:
        """Fills empty caches with the longest beginning of a prompt, up to a cut, that is held; returns its length."""
        for length in sorted(cuts, reverse=True):
            held = self._held.get(key := (adapter, tuple(ids[:length])))
            if held is not None:
                self._held.move_to_end(key)
                self.hits += 1
                for cache, (keys, values) in zip(caches, held, strict=True):
                    cache.state = keys, values, length
                return length
        self.misses += bool(cuts)
        return 0

    def store(self, adapter: str | None, ids: Sequence[int], caches: Sequence[KVCache]) -> None:
        """Keeps what the caches hold: the beginning `ids` and nothing else."""
        key, length = (adapter, tuple(ids)), len(ids)
        if key in self._held or not self.limit_bytes:
            return
        held = [
            (mx.contiguous(cache.keys[:, :, :length]), mx.contiguous(cache.values[:, :, :length]))
            for cache in caches
            if cache.keys is not None and cache.values is not None
        ]
        size = _bytes(held)
        if size > self.limit_bytes:
            return
        while self.held_bytes + size > self.limit_bytes:
            self._forget(next(iter(self._held)))
        mx.eval(held)
        self._held[key] = held
        self.held_bytes += size

    def forget(self, adapter: str | None) -> None:
        """Forgets everything computed with an adapter."""
        for key in [key for key in self._held if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        self.held_bytes -= _bytes(self._held.pop(key))


def _bytes(held: Sequence[tuple[mx.array, mx.array]]) -> int:
    return sum(array.nbytes for pair in held for array in pair)
