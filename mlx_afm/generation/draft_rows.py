"""The draft model's side of a batch: its keys and values of the same rows, in the same order, and what it proposes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from mlx_afm.generation.batch_cache import BatchCache
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.draft_length import USUALLY_MISSING
from mlx_afm.generation.rows import Row
from mlx_afm.generation.speculation import Speculation
from mlx_afm.generation.speculative import Proposals, propose_tokens
from mlx_afm.model import KVCache
from mlx_afm.model.low_rank import Routes

FED_TOKENS = (
    USUALLY_MISSING  # at the begin of a round: a row lacks one token, or two if all its proposals were accepted
)
TIMED_STEPS = 4  # plain ones, for a comparison, after one that is not timed
MOST_FED_TOKENS = 16  # of rows that lack more, after plain steps; what lacks still more is computed like a prompt


class DraftRows:
    """Proposes tokens to the rows of a batch.

    Args:
        speculation: the draft model.
        target: the decoder of the target; the draft's steps are compiled where its steps are.
        prefix_bytes: of the keys and values of prompts that are kept for others which begin with the same ids; 0 keeps
            none.

    Cost: one step of the draft for each proposed token of all rows. The first step takes the last two tokens of every
        row: what a row has of them already is computed again, and written where it stands.
    """

    def __init__(self, speculation: Speculation, target: Decoder, *, prefix_bytes: int = 0) -> None:
        held = speculation.draft_decoder(target)
        self.decoder, self._route = held.decoder, held.route
        self._prefixes = speculation.prefixes if prefix_bytes else None
        if self._prefixes is not None:
            self._prefixes.limit_bytes = prefix_bytes
        self._cache = self.decoder.new_cache()

    def clear(self) -> None:
        """Forgets all rows."""
        self._cache = self.decoder.new_cache()

    def join(self, rows: Sequence[Row]) -> None:
        """Takes some rows that have one prompt."""
        ids = list(rows[0].request.ids)
        found = None if self._prefixes is None else self._prefixes.fetch(ids)
        caches, done = found or (self.decoder.form.model.make_cache(), 0)
        self._read(rows[0], done, len(ids), caches)
        if self._prefixes is not None:
            self._prefixes.store(ids, caches)
        for _ in rows:
            self._cache.append(caches, len(ids))

    def keep(self, indices: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        self._cache.keep(indices)

    def store(self, index: int, row: Row) -> None:
        """Keeps a row's keys and values for prompts that begin with its prompt and answer."""
        if self._prefixes is not None:
            length = min(self._cache.lengths[index], row.length)
            self._prefixes.store(row.ids(0, length), self._cache.extract(index, length))

    def propose(self, rows: Sequence[Row], length: int, *, steps_done: int) -> Proposals:
        """So many tokens for each row; nothing is waited for, unless logits depend on tokens.

        Args:
            rows: of the batch, each with at least one token given out.
            length: at least 1.
            steps_done: see `Decoder.step`.
        """
        if self.missing(rows) > MOST_FED_TOKENS:
            self._catch_up(rows)
        proposed: list[mx.array] = []
        drafted: list[mx.array] = []
        logits_BV = self._first(rows, steps_done)
        while True:
            proposed.append(propose_tokens(rows, logits_BV, proposed))
            drafted.append(logits_BV)
            mx.async_eval(proposed[-1])  # type: ignore[no-untyped-call]
            if len(proposed) == length:
                return Proposals(mx.stack(proposed, axis=1), mx.stack(drafted, axis=1))
            logits_BV = self._step(proposed[-1][:, None], steps_done)[:, -1]
            self._cache.lengths = [held + 1 for held in self._cache.lengths]

    def accept(self, rows: Sequence[Row], accepted: Sequence[int]) -> None:
        """Forgets what rows refused. The last proposal is not held yet, even if it was accepted."""
        lengths = [row.length + count for row, count in zip(rows, accepted)]
        self._cache.lengths = [min(held, length) for held, length in zip(self._cache.lengths, lengths)]

    def missing(self, rows: Sequence[Row]) -> int:
        """The most tokens of a row that the draft has yet to read."""
        return max(row.length - held for row, held in zip(rows, self._cache.lengths))

    def _first(self, rows: Sequence[Row], steps_done: int) -> mx.array:
        """Logits (B, V) after each row's newest token."""
        width = FED_TOKENS
        while width < self.missing(rows):
            width *= 2
        lengths = [row.length for row in rows]
        starts = [max(length - width, 0) for length in lengths]
        fed = [row.ids(start, start + width) for row, start in zip(rows, starts)]
        tokens_BL = mx.array([ids + [0] * (width - len(ids)) for ids in fed], mx.int32)
        self._cache.lengths = starts
        logits_BLV = self._step(tokens_BL, steps_done)
        self._cache.lengths = lengths
        places = [length - 1 - start for length, start in zip(lengths, starts)]
        if min(places) == width - 1:
            return logits_BLV[:, -1]
        return logits_BLV[mx.arange(len(rows)), mx.array(places)]

    def _step(self, tokens_BL: mx.array, steps_done: int) -> mx.array:
        """Logits (B, L, V) of the rows, without those of idle ones."""
        rows = tokens_BL.shape[0]
        tokens_BL = padded_rows(tokens_BL, self._cache)
        return self.decoder.step(tokens_BL, self._cache, self._route, steps_done=steps_done)[:rows]

    def _catch_up(self, rows: Sequence[Row]) -> None:
        """Reads what each row lacks but its newest token, row by row."""
        held, self._cache = self._cache, self.decoder.new_cache()
        for index, row in enumerate(rows):
            caches, length = held.extract(index), row.length - 1
            self._read(row, held.lengths[index], length, caches)
            self._cache.append(caches, length)

    def _read(self, row: Row, start: int, end: int, caches: Sequence[KVCache]) -> None:
        """Computes keys and values of some of a row's tokens."""
        step = row.request.config.prefill_step_size
        for begin in range(start, end, step):
            piece = mx.array([row.ids(begin, min(begin + step, end))])
            self.decoder.prefill(piece, caches, self._route, logits=False)
            mx.eval([cache.state for cache in caches])


def padded_rows(tokens_BL: mx.array, cache: BatchCache) -> mx.array:
    """The tokens with zeros for idle rows of the storage."""
    missing = cache.rows - tokens_BL.shape[0]
    return mx.pad(tokens_BL, [(0, missing), (0, 0)]) if missing else tokens_BL


def plain_step_seconds(decoder: Decoder, cache: BatchCache, routes: Routes, *, steps_done: int) -> float:
    """What a plain step of the rows takes, behind what they hold; what it writes is never read.

    Cost: five such steps.
    """
    tokens_B1, started = mx.zeros((cache.rows, 1), mx.int32), 0.0
    for step in range(TIMED_STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        logits_BLV = decoder.step(tokens_B1, cache, routes, steps_done=steps_done)
        mx.eval(mx.argmax(logits_BLV, axis=-1), cache.keys, cache.values)
    return (time.perf_counter() - started) / TIMED_STEPS
