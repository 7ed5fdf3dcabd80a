"""Keys and values of recent prompts, for others that begin with the same ids; exact."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_afm.model import KVCache

LIMIT_BYTES = 1 << 29


@dataclass(eq=False)
class Prefix:
    """Ids and, for each full layer, a cache that begins with their keys and values."""

    owner: Hashable
    ids: list[int]
    layers: list[KVCache]
    nbytes: int

    def common(self, ids: Sequence[int]) -> int:
        """How many ids a prompt has in common with this one from its beginning; one at least is left to compute."""
        limit = min(len(self.ids), len(ids) - 1)
        if self.ids[:limit] == list(ids[:limit]):
            return max(limit, 0)
        return next(place for place in range(limit) if self.ids[place] != ids[place])


class PrefixCache:
    """The least recently used prefixes leave when there are too many bytes.

    Args:
        limit_bytes: of all of them; 0 holds none. The real model takes 36 KB a token in 16 bits.

    Example: after `store(ids, caches, owner)`, `fetch(other_ids, owner)` gives caches of all ids that both begin with, and
    how many these are; compute the rest (`other_ids[tokens:]`) with these caches. Prompts of different owners, such as
    adapters, know nothing of each other. When an owner's weights change, `forget` it.

    Attributes:
        held_bytes: of all of them.
        hits, misses: of `fetch`.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self.hits = self.misses = 0
        self._held: list[Prefix] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def fetch(
        self, ids: Sequence[int], owner: Hashable = None, boundaries: Sequence[int] | None = None
    ) -> tuple[list[KVCache], int] | None:
        """Caches with the longest known beginning of a prompt, and its length; None if there is none.

        Args:
            ids: the prompt.
            owner: see the class.
            boundaries: the lengths that the beginning may have; None for any.
        """
        best, tokens = None, 0
        for prefix in self._held:
            if prefix.owner != owner:
                continue
            common = prefix.common(ids)
            if boundaries is not None:
                common = max((boundary for boundary in boundaries if boundary <= common), default=0)
            if common > tokens:
                best, tokens = prefix, common
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._held.remove(best)
        self._held.append(best)
        return [layer.copy(tokens) for layer in best.layers], tokens

    def store(self, ids: Sequence[int], caches: Sequence[KVCache], owner: Hashable = None) -> None:
        """Keeps the keys and values of ids with which caches begin; prefixes that these ids begin with are let go."""
        ids = list(ids)
        own = [prefix for prefix in self._held if prefix.owner == owner]
        if any(prefix.ids[: len(ids)] == ids for prefix in own):
            return
        layers = [_copied(cache, len(ids)) for cache in caches]
        size = sum(layer.nbytes for layer in layers)
        if size > self.limit_bytes:
            return
        mx.eval([layer.state for layer in layers])
        for prefix in own:
            if ids[: len(prefix.ids)] == prefix.ids:
                self._drop(prefix)
        while self.held_bytes + size > self.limit_bytes:
            self._drop(self._held[0])
        self._held.append(Prefix(owner, ids, layers, size))
        self.held_bytes += size

    def forget(self, owns: Hashable) -> None:
        """Forgets an owner's prefixes; those of a tuple that contains it too."""
        for prefix in list(self._held):
            if prefix.owner == owns or (isinstance(prefix.owner, tuple) and owns in prefix.owner):
                self._drop(prefix)

    def newest(self, owner: Hashable = None) -> Prefix | None:
        """The prefix of an owner that was of use last."""
        return next((prefix for prefix in reversed(self._held) if prefix.owner == owner), None)

    def _drop(self, prefix: Prefix) -> None:
        self._held.remove(prefix)
        self.held_bytes -= prefix.nbytes


def _copied(cache: KVCache, tokens: int) -> KVCache:
    """A cache of the first tokens in storage of its own, without room."""
    copy = cache.copy(tokens)
    assert copy.keys is not None
    assert copy.values is not None
    copy.keys, copy.values = mx.contiguous(copy.keys), mx.contiguous(copy.values)
    return copy
