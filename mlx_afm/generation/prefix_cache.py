"""Keys and values of recent prompts, for others that begin with the same ids; exact."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_afm.model import KVCache

LIMIT_BYTES = 1 << 29


@dataclass
class PromptCache:
    """A prompt's ids and, for each full layer, a cache that begins with their keys and values."""

    ids: list[int]
    layers: list[KVCache]

    def shared(self, ids: Sequence[int]) -> int:
        """How many ids a prompt begins with that can be taken from here: one at least is left to compute."""
        limit = min(len(self.ids), len(ids) - 1)
        if self.ids[:limit] == list(ids[:limit]):
            return max(limit, 0)
        return next(place for place in range(limit) if self.ids[place] != ids[place])

    def take(self, tokens: int) -> list[KVCache]:
        """Caches of the first tokens, to go on with; they stay as they are here."""
        return [layer.copy(tokens) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(layer.nbytes for layer in self.layers)


def prefix_owner(owner: Hashable = None, adapter: str | None = None, kv_bits: int | None = None) -> Hashable:
    """Whose prompts go together: those of an owner, with one adapter, in one kind of cache."""
    return owner, adapter, kv_bits


class PrefixCache:
    """The least recently used prefixes leave when there are too many bytes.

    Args:
        limit_bytes: of all of them; 0 holds none. The real model takes 36 KB a token in 16 bits.
        max_tokens: of all of them, besides; None for no such limit.

    Example: after `store(ids, caches, owner)`, `fetch(other_ids, owner)` gives caches of all ids that both begin with,
    and how many these are; compute the rest (`other_ids[tokens:]`) with these caches. Prompts of different owners, such
    as adapters, know nothing of each other. When an owner's weights change, `clear` it.

    Attributes:
        held_bytes, tokens: of all of them.
        hits, misses: of `fetch`.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES, *, max_tokens: int | None = None) -> None:
        self.limit_bytes, self.max_tokens = limit_bytes, max_tokens
        self.hits = self.misses = self.held_bytes = self.tokens = 0
        self._held: list[tuple[Hashable, PromptCache]] = []  # the least recently used first

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
        for entry in self._held:
            if entry[0] != owner:
                continue
            common = entry[1].shared(ids)
            if boundaries is not None:
                common = max((boundary for boundary in boundaries if boundary <= common), default=0)
            if common >= max(tokens, 1):
                best, tokens = entry, common
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._held.remove(best)
        self._held.append(best)
        return best[1].take(tokens), tokens

    def store(self, ids: Sequence[int], caches: Sequence[KVCache], owner: Hashable = None) -> None:
        """Keeps the keys and values of ids with which caches begin; prefixes that these ids begin with are let go."""
        ids = list(ids)
        own = [entry for entry in self._held if entry[0] == owner]
        if any(held.ids[: len(ids)] == ids for _, held in own) or not self._can_hold(len(ids), 0):
            return
        kept = PromptCache(ids, [_copied(cache, len(ids)) for cache in caches])
        if not self._can_hold(len(ids), kept.nbytes):
            return
        mx.eval([layer.state for layer in kept.layers])
        for entry in own:
            if ids[: len(entry[1].ids)] == entry[1].ids:
                self._drop(entry)
        while not self._can_hold(self.tokens + len(ids), self.held_bytes + kept.nbytes):
            self._drop(self._held[0])
        self._held.append((owner, kept))
        self.held_bytes, self.tokens = self.held_bytes + kept.nbytes, self.tokens + len(ids)

    def clear(self, owner: Hashable = None) -> None:
        """Forgets an owner's prefixes."""
        for entry in [entry for entry in self._held if entry[0] == owner]:
            self._drop(entry)

    def newest(self, owner: Hashable = None) -> PromptCache | None:
        """The prompt of an owner that was of use last."""
        return next((held for held_owner, held in reversed(self._held) if held_owner == owner), None)

    def _can_hold(self, tokens: int, size_bytes: int) -> bool:
        few = self.max_tokens is None or tokens <= self.max_tokens
        return few and self.limit_bytes > 0 and size_bytes <= self.limit_bytes

    def _drop(self, entry: tuple[Hashable, PromptCache]) -> None:
        self._held.remove(entry)
        self.held_bytes, self.tokens = self.held_bytes - entry[1].nbytes, self.tokens - len(entry[1].ids)


def _copied(cache: KVCache, tokens: int) -> KVCache:
    """A cache of the first tokens in storage of its own, without room."""
    copy = cache.copy(tokens)
    assert copy.keys is not None
    assert copy.values is not None
    copy.keys, copy.values = mx.contiguous(copy.keys), mx.contiguous(copy.values)
    return copy
