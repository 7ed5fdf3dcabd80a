"""The decode engine: prompts become rows of one batch, and every step gives a token of each row.

    engine = Engine(decoder)
    row = engine.add(Request(ids=ids, config=config))
    while engine.busy:
        for event in engine.step(): ...

Rows join and leave between two tokens, each with its own adapter, settings and randomness; an answer does not depend on
its neighbours. All callers use it: one prompt, files of prompts, chat, samples in training, and the server.

With a draft model, one pass of the target may give a row several tokens. They are given out one a step all the same, so
that a caller can end a row behind each; nothing is computed meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.generation.batch_cache import BatchCache
from mlx_afm.generation.config import require_fitting
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.draft_rows import DraftRows, padded_rows, plain_step_seconds
from mlx_afm.generation.prefix_cache import PrefixCache, prefix_owner
from mlx_afm.generation.rows import LENGTH, STOP, FinishReason, Progress, Request, Row, TokenEvent
from mlx_afm.generation.sampling import SampledTokens, Sampler, TokenLogprob, sample
from mlx_afm.generation.scoring import score_tokens
from mlx_afm.generation.speculation import Speculation, require_pair
from mlx_afm.generation.speculative import Verdict, judge, length_needed
from mlx_afm.model import KVCache
from mlx_afm.model.low_rank import Routes
from mlx_afm.text.tokenizer import require_token_ids

BATCH_SIZE = 16
CLEAR_CACHE_INTERVAL = 256  # steps after which freed memory goes back to the system, as in mlx-lm


@dataclass(eq=False)
class _Prefill:
    """A prompt that is being computed, up to `done`."""

    rows: list[Row]
    caches: list[KVCache] = field(default_factory=list)
    done: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """Answers requests together.

    Args:
        decoder: of the model.
        batch_size: rows at once; others wait.
        prefix_cache: keys and values of earlier prompts; None computes every prompt whole.
        owner: of the prefixes, such as a model; with the adapter's name it says whose prompts go together.
        routes: what rows with some adapters add to the base, see `adapters.inference`.
        prompts_first: compute all waiting prompts before the next token, as throughput wants it; else one piece of one
            prompt for each token, so that nobody waits long.
        speculation: a draft model, whose proposals are verified for all rows in one pass; None decodes plainly. With a
            prefix cache it keeps prefixes of its own, in as many bytes again.
        keep_answers: store prompt and answer in the prefix cache when a row ends, for the next turn of a conversation.

    Attributes:
        rows: the answers that decode.
        overflow: engines of the same decoder that take the answers of a request which find no room here, in this order.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        batch_size: int = BATCH_SIZE,
        prefix_cache: PrefixCache | None = None,
        owner: Hashable = None,
        routes: Callable[[Sequence[str | None]], Routes] = lambda names: (),
        prompts_first: bool = True,
        keep_answers: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingError("batch_size", expected="at least 1", found=batch_size)
        self.decoder, self.batch_size = decoder, batch_size
        self.prefix_cache, self._owner = prefix_cache, owner
        self.speculation = speculation
        self._routes_of, self._prompts_first, self._keep_answers = routes, prompts_first, keep_answers
        self._waiting: deque[list[Row]] = deque()
        self._prefills: deque[_Prefill] = deque()
        self.rows: list[Row] = []
        self.overflow: Sequence[Engine] = ()
        self._cache: BatchCache | None = None
        self._sampled: SampledTokens | None = None  # each row's newest token, not given out and not in the cache yet
        self._steps = self._batch_steps = self._pieces = 0
        # Proposals that are not given out yet.
        self._accepted: dict[Row, deque[tuple[TokenLogprob, Callable[[], mx.array]]]] = {}
        self._given: set[Row] = set()  # those whose newest token was given out and awaits a round
        self._length = 0  # proposals of that round
        self._drafts = self._lengths = None
        if speculation is not None:
            require_pair(decoder.form.model, speculation.draft)
            size = 0 if prefix_cache is None else prefix_cache.limit_bytes
            self._drafts = DraftRows(speculation, decoder, prefix_bytes=size)
            self._lengths = speculation.adaptive_length(decoder.form.model)

    @property
    def busy(self) -> bool:
        """Whether an answer is under way or waiting."""
        return bool(self.rows or self._waiting or self._prefills)

    @property
    def reading(self) -> bool:
        """Whether a prompt is being computed or waits for that."""
        return bool(self._waiting or self._prefills)

    @property
    def rows_in_use(self) -> int:
        """Rows that decode or whose prompt is being computed."""
        return len(self.rows) + sum(len(prefill.rows) for prefill in self._prefills)

    def add(self, request: Request) -> list[Row]:
        """Takes a request; its rows join the batch when there is room.

        Raises:
            ConfigError: a prompt that is empty, fills the context or has an id outside the vocabulary, settings that do
                not fit the model, or a kind of cache other than that of rows under way.
        """
        if not request.ids:
            raise ConfigError("an empty prompt")
        require_token_ids(request.ids, self.decoder.form.model.args.vocab_size, where="prompt")
        config = request.config
        require_fitting(config, self.decoder.form.model)
        for other in self._all_rows():
            if other.request.config.kv_bits != config.kv_bits:
                expected = other.request.config.kv_bits
                raise ConfigError("rows of one batch differ in kv_bits", expected=expected, found=config.kv_bits)
        limit = 0 if request.max_tokens == 0 else config.answer_tokens(len(request.ids))
        limit = limit if request.max_tokens is None else min(limit, request.max_tokens)
        own = Sampler(config, processors=request.logits_processors, prompt=request.ids)
        rows = [Row(request, sampler, limit) for sampler in request.samplers or (own,)]
        self._waiting.append(rows)
        return rows

    def remove(self, rows: Sequence[Row]) -> None:
        """Ends answers early, wherever they are; those that are over are ignored."""
        gone = set(map(id, rows))
        self._waiting = deque(kept for held in self._waiting if (kept := [row for row in held if id(row) not in gone]))
        for prefill in self._prefills:
            prefill.rows, left = [row for row in prefill.rows if id(row) not in gone], prefill.rows
            if not prefill.rows and self._keep_answers and self.prefix_cache is not None and prefill.done:
                request = left[0].request
                self.prefix_cache.store(request.ids[: prefill.done], prefill.caches, self._kind(request))
        self._prefills = deque(prefill for prefill in self._prefills if prefill.rows)
        self._keep([index for index, row in enumerate(self.rows) if id(row) not in gone])

    def remove_all(self) -> None:
        """Ends all answers."""
        self.remove(self._all_rows())

    def step(self) -> list[TokenEvent]:
        """Computes waiting prompts or the next tokens, and gives at most one of each row; finished rows leave."""
        if self._accepted:
            return self._give_accepted()
        if self._given:
            return self._round()
        if self._lengths is not None:
            self._lengths.finish()
        pieces = self._pieces
        events = self._drop_faulty() + self._prefill()
        if not self.rows:
            return events
        assert self._sampled is not None
        self._length = self._planned_length()
        if self._length:
            events += self._give_newest(self._sampled)
            self._given = set(self.rows)
        else:
            events += self._plain(self._sampled, alone=pieces == self._pieces)
        self._steps += 1
        if self._steps % CLEAR_CACHE_INTERVAL == 0:
            mx.clear_cache()
        if self._lengths is not None and not self.rows:
            self._lengths.abandon()  # who knows when the next step will be
        return events

    # Prompts.

    def _prefill(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while True:
            while self._waiting and self._has_room(len(self._waiting[0])):
                self._prefills.append(_Prefill(self._waiting.popleft()))
            if not self._prefills:
                return events
            events += self._read(self._prefills[0])
            if not self._prompts_first:
                return events

    def _has_room(self, rows: int) -> bool:
        """Whether a request with so many answers can start; one that is larger than all room waits for all of it."""
        free = sum(max(engine.batch_size - engine.rows_in_use, 0) for engine in (self, *self.overflow))
        return rows <= free or not self.rows_in_use

    def _start(self, prefill: _Prefill) -> None:
        """Takes what the prefix cache holds of a prompt; only now, when all earlier prompts are in it."""
        request = prefill.rows[0].request
        prefill.caches = self.decoder.form.model.make_cache(quantized=request.config.kv_bits is not None)
        if self.prefix_cache is not None and (request.prompt_logprobs is None or request.prefix_boundaries):
            found = self.prefix_cache.fetch(request.ids, self._kind(request), request.prefix_boundaries)
            prefill.caches, prefill.done = found or (prefill.caches, 0)
        for row in prefill.rows:
            row.cached_tokens = prefill.done

    def _read(self, prefill: _Prefill) -> list[TokenEvent]:
        """Computes the next piece of a prompt; after the last one its rows join the batch."""
        if not prefill.caches:
            self._start(prefill)
        request = prefill.rows[0].request
        ids, boundaries = request.ids, request.prefix_boundaries or ()
        end = next((boundary for boundary in boundaries if boundary > prefill.done), len(ids))
        end = min(end, prefill.done + request.config.prefill_step_size)
        tokens = mx.array([list(ids[prefill.done : end])])
        routes = self._routes_of([request.adapter])
        logits = None
        first = max(prefill.done + 1, request.scored_from)
        if request.prompt_logprobs is not None and first <= end:
            model, hidden_LD = self.decoder.form.model, self.decoder.hidden(tokens, prefill.caches, routes)
            before_LD, targets = hidden_LD[first - 1 - prefill.done :], ids[first : end + 1]
            prefill.logprobs += score_tokens(model, before_LD, targets, request.prompt_logprobs)
            logits = model.logits(hidden_LD[-1:])
        elif end == len(ids) and prefill.rows[0].max_tokens:
            logits = self.decoder.prefill(tokens, prefill.caches, routes)
        else:
            self.decoder.prefill(tokens, prefill.caches, routes, logits=False)
        if end < len(ids):
            mx.eval([cache.state for cache in prefill.caches])
            mx.clear_cache()
        prefill.done, self._pieces = end, self._pieces + 1
        if self.prefix_cache is not None and _is_kept(request, end):
            self.prefix_cache.store(ids[:end], prefill.caches, self._kind(request))
        if request.on_progress is not None:
            mx.eval([cache.state for cache in prefill.caches])
            known = prefill.rows[0].cached_tokens
            request.on_progress(end - known, len(ids) - known)
        if end < len(ids):
            return []
        self._prefills.remove(prefill)
        for row in prefill.rows:
            row.prompt_logprobs = prefill.logprobs
        if logits is None or not prefill.rows[0].max_tokens:
            return [TokenEvent(row, TokenLogprob(-1), finish_reason=LENGTH) for row in prefill.rows]
        return self._join(prefill, logits)

    def _join(self, prefill: _Prefill, logits_1V: mx.array) -> list[TokenEvent]:
        events, rows = [], prefill.rows
        for engine in (self, *self.overflow) if self.overflow else ():
            room = max(engine.batch_size - len(engine.rows), 0)
            if room and rows:
                events += engine._take(rows[:room], prefill, logits_1V)
                rows = rows[room:]
        return events + self._take(rows, prefill, logits_1V) if rows else events

    def _take(self, rows: list[Row], prefill: _Prefill, logits_1V: mx.array) -> list[TokenEvent]:
        """Puts rows behind the others, with their first tokens, which are given out with the next step."""
        sampled = sample([row.sampler for row in rows], mx.repeat(logits_1V, len(rows), axis=0), [0] * len(rows))
        if self._cache is None or not self.rows:
            quantized = rows[0].request.config.kv_bits is not None
            self._cache, self._batch_steps = self.decoder.new_cache(quantized=quantized), 0
            if self._drafts is not None:
                self._drafts.clear()
        for _ in rows:
            self._cache.append(prefill.caches, prefill.done)
        if self._drafts is not None:
            self._drafts.join(rows)
        self._sampled = sampled if self._sampled is None else self._sampled.joined(sampled)
        self.rows = [*self.rows, *rows]
        return self._drop_faulty()

    def _kind(self, request: Request) -> Hashable:
        return prefix_owner(self._owner, request.adapter, request.config.kv_bits)

    # Tokens.

    def _plain(self, sampled: SampledTokens, *, alone: bool) -> list[TokenEvent]:
        """Gives the newest token of each row, and computes the next one; `alone` if no prompt was computed before."""
        if self._lengths is not None:
            self._lengths.start(self.rows, 0, counts=alone)
        lookahead = not any(row.sampler.changes_logits for row in self.rows)
        if lookahead and any(len(row.tokens) + 1 < row.max_tokens for row in self.rows):
            self._decode(unread=1)  # under way while the caller looks at these tokens
        given = self._give_newest(sampled)
        if not lookahead and self.rows:
            self._decode(unread=0)
            return self._drop_faulty() + given
        return given

    def _decode(self, *, unread: int) -> None:
        """Computes each row's next token; `unread` of its tokens are sampled and not given out yet."""
        assert self._cache is not None
        assert self._sampled is not None
        tokens_B1 = padded_rows(self._sampled.tokens_B[:, None], self._cache)
        logits_BV = self.decoder.step(tokens_B1, self._cache, self._routes(), steps_done=self._batch_steps)[:, -1]
        self._batch_steps += 1
        self._cache.lengths = [length + 1 for length in self._cache.lengths]
        counts = [len(row.tokens) + unread for row in self.rows]
        self._sampled = sample([row.sampler for row in self.rows], logits_BV[: len(self.rows)], counts)

    def _routes(self) -> Routes:
        """What the rows' adapters add; not kept, so that adapters can come and go between two steps."""
        assert self._cache is not None
        names = [row.request.adapter for row in self.rows]
        return self._routes_of(names + names[:1] * (self._cache.rows - len(names)))  # idle rows take the first row's

    def _give_newest(self, sampled: SampledTokens) -> list[TokenEvent]:
        """Gives sampled tokens, one of each row that was not given its own yet; finished rows leave."""
        if self._given.issuperset(self.rows):
            return []
        given = [
            self._give(row, token, partial(sampled.processed, index))
            for index, (row, token) in enumerate(zip(self.rows, sampled.read()))
            if row not in self._given
        ]
        self._keep_unfinished(given)
        return given

    def _give(
        self, row: Row, token: TokenLogprob, processed_1V: Callable[[], mx.array], *, from_draft: bool = False
    ) -> TokenEvent:
        row.tokens.append(token.token)
        row.sampler.tokens.append(token.token)
        reason: FinishReason | None = None
        if token.token in row.request.stop_token_ids:
            reason = STOP
        elif len(row.tokens) >= row.max_tokens:
            reason = LENGTH
        return TokenEvent(row, token, processed_1V, reason, from_draft)

    # Tokens that a draft model proposes.

    def _planned_length(self) -> int:
        """Proposals of the next round; 0 for a plain step."""
        if self.speculation is None or self._drafts is None:
            return 0
        if self._lengths is not None:
            return self._lengths.plan(self.rows, self._drafts.missing(self.rows))
        return self.speculation.num_draft_tokens or 0

    def _round(self) -> list[TokenEvent]:
        """Has the target judge some proposals, and gives the first accepted ones.

        The rows have been given their newest tokens by the step before, so that a round which fails loses none, and can
        be tried again; but for rows of another engine's prompts, which may have joined in between.
        """
        assert self._sampled is not None
        assert self._cache is not None
        assert self._drafts is not None
        assert self.speculation is not None
        given = self._give_newest(self._sampled)
        if not self.rows:
            return given
        fixed = self._lengths is None
        needed = [length_needed(row, fixed=fixed) for row in self.rows]
        length = next(held for held in (0, *self.speculation.lengths) if held >= min(self._length, max(needed)))
        if not length:
            self._decode(unread=0)
            self._given = set()
            return given + self._drop_faulty()
        started = time.perf_counter()
        if self._lengths is not None:
            self._lengths.start(self.rows, length, missing=self._drafts.missing(self.rows))
        verdict = self._judged(length, fixed=fixed)
        self._drafts.accept(self.rows, verdict.accepted)
        self._cache.lengths = [held + 1 + count for held, count in zip(self._cache.lengths, verdict.accepted)]
        self._sampled, self._given = verdict.own, set()
        self._accepted = {row: deque(tokens) for n, row in enumerate(self.rows) if (tokens := verdict.tokens(n))}
        drafted = [max(min(length, count), 0) for count in needed]
        accepted = [min(pair) for pair in zip(drafted, verdict.accepted)]
        seconds = time.perf_counter() - started
        self.speculation.add_round(sum(drafted), sum(accepted), seconds, rows=len(self.rows))
        if self._lengths is not None:
            self._lengths.add(self.rows, drafted, accepted)
        return given + self._give_accepted()

    def _judged(self, length: int, *, fixed: bool) -> Verdict:
        """What one pass of the target makes of so many proposals for each row."""
        assert self._cache is not None
        assert self._drafts is not None
        proposals = self._drafts.propose(self.rows, length, steps_done=self._batch_steps)
        newest_B1 = mx.array([row.tokens[-1:] for row in self.rows], mx.int32)
        tokens_BM = padded_rows(mx.concatenate([newest_B1, proposals.tokens_BN], axis=1), self._cache)
        logits_BMV = self.decoder.step(tokens_BM, self._cache, self._routes(), steps_done=self._batch_steps)
        self._batch_steps += 1
        return judge(self.rows, logits_BMV[: len(self.rows)], proposals, fixed=fixed)

    def _give_accepted(self) -> list[TokenEvent]:
        """Gives the next accepted token of each row that has one; finished rows leave."""
        events = [self._give(row, *held.popleft(), from_draft=True) for row, held in self._accepted.items()]
        self._accepted = {row: held for row, held in self._accepted.items() if held}
        self._keep_unfinished(events)
        return events

    def _keep_unfinished(self, events: Sequence[TokenEvent]) -> None:
        over = {event.row for event in events if event.finish_reason is not None}
        self._keep([index for index, row in enumerate(self.rows) if row not in over])

    def _drop_faulty(self) -> list[TokenEvent]:
        """Ends the rows whose logits could not be processed."""
        faulty = [row for row in self.rows if row.sampler.error is not None]
        if not faulty:
            return []
        self._keep([index for index, row in enumerate(self.rows) if row.sampler.error is None])
        return [TokenEvent(row, TokenLogprob(-1), error=row.sampler.error) for row in faulty]

    # Leaving.

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self.rows):
            return
        assert self._cache is not None
        if self._keep_answers and self.prefix_cache is not None:
            for index in sorted(set(range(len(self.rows))) - set(indices)):
                self._store_answer(index)
        if not indices and self.speculation is not None and self.speculation.wants_plain_time:
            seconds = plain_step_seconds(self.decoder, self._cache, self._routes(), steps_done=self._batch_steps)
            self.speculation.plain_step_seconds = seconds
        self.rows = [self.rows[index] for index in indices]
        self._accepted = {row: held for row, held in self._accepted.items() if row in self.rows}
        self._given &= set(self.rows)
        self._cache.keep(indices)
        if self._drafts is not None:
            self._drafts.keep(indices)
        self._sampled = self._sampled.rows(indices) if self._sampled is not None and indices else None

    def _store_answer(self, index: int) -> None:
        assert self._cache is not None
        assert self.prefix_cache is not None
        row = self.rows[index]
        length = min(self._cache.lengths[index], row.length)
        self.prefix_cache.store(row.ids(0, length), self._cache.extract(index, length), self._kind(row.request))
        if self._drafts is not None:
            self._drafts.store(index, row)

    def _all_rows(self) -> list[Row]:
        waiting = [row for rows in self._waiting for row in rows]
        return [*self.rows, *(row for prefill in self._prefills for row in prefill.rows), *waiting]


def _is_kept(request: Request, end: int) -> bool:
    """Whether the first `end` tokens of a prompt are stored: the whole prompt, or up to the first or last boundary.

    Prompts of other conversations share the first, and the next turn of this one has the last.
    """
    if request.prefix_boundaries is None:
        return end == len(request.ids)
    return bool(request.prefix_boundaries) and end in (request.prefix_boundaries[0], request.prefix_boundaries[-1])


__all__ = ["BATCH_SIZE", "LENGTH", "STOP", "Engine", "Progress", "Request", "Row", "TokenEvent"]
