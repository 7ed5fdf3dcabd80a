"""Answers under way: alone while their prompt is read, then as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_afm.model.cache import KVCache
from mlx_afm.serving.jobs import Job, Sink
from mlx_afm.serving.sampling import Chooser, Chosen


@dataclass(eq=False)
class Row:
    """One answer under way; `fault` is what went wrong with changing its logits."""

    job: Job
    sink: Sink
    chooser: Chooser
    fault: Exception | None = None


@dataclass(eq=False)
class Prefill:
    """A prompt that is being read, up to `done`."""

    job: Job
    caches: list[KVCache]
    done: int = 0


@dataclass(eq=False)
class Batch:
    """Rows with the same adapter, their keys and values, and their next tokens, which were not said yet."""

    adapter: str | None
    caches: list[KVCache]
    rows: list[Row]
    chosen: Chosen

    @classmethod
    def of(cls, row: Row, caches: Sequence[KVCache], chosen: Chosen) -> Batch:
        """A batch of one row; the caches stay as they are."""
        return cls(row.job.adapter, [cache.copy() for cache in caches], [row], chosen)

    def join(self, row: Row, caches: Sequence[KVCache], chosen: Chosen) -> None:
        """Adds a row with its keys and values and its next token."""
        for held, cache in zip(self.caches, caches, strict=True):
            held.extend(cache)
        self.chosen = self.chosen.joined(chosen)
        self.rows.append(row)

    def keep(self, stays: Sequence[bool]) -> None:
        """Drops the rows that do not stay."""
        kept = [index for index, stay in enumerate(stays) if stay]
        self.rows = [self.rows[index] for index in kept]
        if kept:
            self.chosen = self.chosen.rows(kept)
            for cache in self.caches:
                cache.filter(kept)
