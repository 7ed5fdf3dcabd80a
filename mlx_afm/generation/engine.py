"""The decode engine: prompts become rows of one batch, and every step gives one token of each row.

    engine = Engine(decoder)
    row = engine.add(Request(ids=ids, config=config))
    while engine.busy:
        for event in engine.step(): ...

Rows join and leave between two tokens, each with its own adapter, settings and randomness; an answer does not depend on
its neighbours. All callers use it: one prompt, files of prompts, chat, samples in training, and the server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.generation.batch_cache import BatchCache
from mlx_afm.generation.config import GenerateConfig, require_fitting
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.prefix_cache import PrefixCache, prefix_owner
from mlx_afm.generation.sampling import LogitsProcessor, Sampled, Sampler, TokenLogprob, sample
from mlx_afm.generation.speculation import Speculation
from mlx_afm.model import KVCache
from mlx_afm.model.low_rank import Slots
from mlx_afm.text.tokenizer import require_token_ids

BATCH_SIZE = 16
CLEAR_CACHE_INTERVAL = 256  # steps after which freed memory goes back to the system, as in mlx-lm
STOP, LENGTH = "stop", "length"  # finish reasons

Progress = Callable[[int, int], None]  # tokens of the prompt computed, and of how many


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it.

    Attributes:
        ids: the prompt.
        samplers: one for each answer wanted; they share the prompt's computation. Without any there is one, of `config`
            and `logits_processors`.
        max_tokens: of each answer; None for what `config` and the context leave.
        config: prefill size, cache kind and context; how to sample, where `samplers` are not given.
        logits_processors: see `Sampler`.
        stop_token_ids: ids that end an answer.
        adapter: a name that the routes know; None for the base.
        prefix_boundaries: lengths of the prompt's beginnings that other prompts may share, ascending. The prompt is
            always computed from boundary to boundary, so that an answer has the same bits whether one was held or not.
            None shares any common beginning.
        on_progress: told of the prompt's computation.
    """

    ids: Sequence[int]
    config: GenerateConfig = field(default_factory=GenerateConfig)
    samplers: Sequence[Sampler] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    prefix_boundaries: Sequence[int] | None = None
    on_progress: Progress | None = None


@dataclass(eq=False)
class Row:
    """One answer under way.

    Attributes:
        request, sampler: what was asked for.
        max_tokens: of the answer.
        tokens: given out so far.
        cached_tokens: of the prompt, how many came from the prefix cache.
    """

    request: Request
    sampler: Sampler
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """A token of a row.

    Attributes:
        row: whose.
        token: its id, with log probabilities if the row's sampler asks for them.
        logprobs_V: of all tokens, float32, not computed unless it is read.
        finish_reason: "stop" with a stop token, "length" with the last token of `max_tokens`; else None. A finished row
            has left.
        from_draft: whether a draft model proposed it.
        error: why the row ended without this token; its logits could not be processed.
    """

    row: Row
    token: TokenLogprob
    logprobs_V: mx.array | None = None
    finish_reason: str | None = None
    from_draft: bool = False
    error: Exception | None = None


@dataclass(eq=False)
class _Prefill:
    """A prompt that is being computed, up to `done`."""

    rows: list[Row]
    caches: list[KVCache]
    done: int


class Engine:
    """Answers requests together.

    Args:
        decoder: of the model.
        batch_size: rows at once; others wait.
        prefix_cache: keys and values of earlier prompts; None computes every prompt whole.
        owner: of the prefixes, such as a model; with the adapter's name it says whose prompts go together.
        routes: the slots of some rows' adapters, and of one adapter alone; see `adapters.inference`.
        prompts_first: compute all waiting prompts before the next token, as throughput wants it; else one piece of one
            prompt for each token, so that nobody waits long.
        speculation: a draft model, whose proposals are verified for all rows in one pass; None decodes plainly.
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
        routes: Callable[[Sequence[str | None]], Mapping[str, Slots]] = lambda names: {},
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
        self._sampled: Sampled | None = None  # each row's newest token, not given out and not in the cache yet
        self._routes: Mapping[str, Slots] = {}
        self._steps = self._batch_steps = 0

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
        limit = config.answer_tokens(len(request.ids))
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
            prefill.rows = [row for row in prefill.rows if id(row) not in gone]
        self._prefills = deque(prefill for prefill in self._prefills if prefill.rows)
        self._keep([index for index, row in enumerate(self.rows) if id(row) not in gone])

    def reroute(self) -> None:
        """Looks up the slots of the rows' adapters again; to be called after adapters were added or removed."""
        # Idle rows of the storage take the first row's.
        names = [row.request.adapter for row in self.rows]
        if self._cache is not None and names:
            names += [names[0]] * (self._cache.rows - len(names))
        self._routes = self._routes_of(names)

    def step(self) -> list[TokenEvent]:
        """Computes waiting prompts, then gives a token of each row; finished rows leave."""
        events = self._prefill()
        if not self.rows:
            return events
        assert self._sampled is not None
        sampled, rows = self._sampled, self.rows
        lookahead = not any(row.sampler.changes_logits for row in rows)
        if lookahead and any(len(row.tokens) + 1 < row.max_tokens for row in rows):
            self._decode(unread=1)  # under way while the caller looks at these tokens
        given = [self._give(row, index, token, sampled) for index, (row, token) in enumerate(zip(rows, sampled.read()))]
        self._keep([index for index, event in enumerate(given) if event.finish_reason is None])
        if not lookahead and self.rows:
            self._decode(unread=0)
            events += self._drop_faulty()
        self._steps += 1
        if self._steps % CLEAR_CACHE_INTERVAL == 0:
            mx.clear_cache()
        return events + given

    # Prompts.

    def _prefill(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while True:
            while self._waiting and self._has_room(len(self._waiting[0])):
                self._prefills.append(self._start(self._waiting.popleft()))
            if not self._prefills:
                return events
            events += self._read(self._prefills[0])
            if not self._prompts_first:
                return events

    def _has_room(self, rows: int) -> bool:
        """Whether a request with so many answers can start; one that is larger than all room waits for all of it."""
        free = sum(max(engine.batch_size - engine.rows_in_use, 0) for engine in (self, *self.overflow))
        return rows <= free or not self.rows_in_use

    def _start(self, rows: list[Row]) -> _Prefill:
        request = rows[0].request
        caches = self.decoder.form.model.make_cache(quantized=request.config.kv_bits is not None)
        done = 0
        if self.prefix_cache is not None:
            found = self.prefix_cache.fetch(request.ids, self._kind(request), request.prefix_boundaries)
            caches, done = found or (caches, 0)
        for row in rows:
            row.cached_tokens = done
        return _Prefill(rows, caches, done)

    def _read(self, prefill: _Prefill) -> list[TokenEvent]:
        """Computes the next piece of a prompt; after the last one its rows join the batch."""
        request = prefill.rows[0].request
        ids, boundaries = request.ids, request.prefix_boundaries or ()
        end = next((boundary for boundary in boundaries if boundary > prefill.done), len(ids))
        end = min(end, prefill.done + request.config.prefill_step_size)
        tokens = mx.array([list(ids[prefill.done : end])])
        routes = self._routes_of([request.adapter])
        prefill.done, logits = end, None
        if end < len(ids):
            self.decoder.prefill(tokens, prefill.caches, routes, logits=False)
            mx.eval([cache.state for cache in prefill.caches])
            mx.clear_cache()
        else:
            logits = self.decoder.prefill(tokens, prefill.caches, routes)
        if self.prefix_cache is not None and _is_kept(request, end):
            self.prefix_cache.store(ids[:end], prefill.caches, self._kind(request))
        if request.on_progress is not None:
            mx.eval([cache.state for cache in prefill.caches])
            request.on_progress(end, len(ids))
        if logits is None:
            return []
        self._prefills.remove(prefill)
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
        for _ in rows:
            self._cache.append(prefill.caches, prefill.done)
        self._sampled = sampled if self._sampled is None else self._sampled.joined(sampled)
        self.rows = [*self.rows, *rows]
        self.reroute()
        return self._drop_faulty()

    def _kind(self, request: Request) -> Hashable:
        return prefix_owner(self._owner, request.adapter, request.config.kv_bits)

    # Tokens.

    def _decode(self, *, unread: int) -> None:
        """Computes each row's next token; `unread` of its tokens are sampled and not given out yet."""
        assert self._cache is not None
        assert self._sampled is not None
        tokens_B = self._sampled.padded(self._cache.rows)
        logits_BV = self.decoder.step(tokens_B[:, None], self._cache, self._routes, steps_done=self._batch_steps)[:, -1]
        self._batch_steps += 1
        self._cache.lengths = [length + 1 for length in self._cache.lengths]
        counts = [len(row.tokens) + unread for row in self.rows]
        self._sampled = sample([row.sampler for row in self.rows], logits_BV[: len(self.rows)], counts)

    def _give(self, row: Row, index: int, token: TokenLogprob, sampled: Sampled) -> TokenEvent:
        row.tokens.append(token.token)
        row.sampler.tokens.append(token.token)
        reason = None
        if token.token in row.request.stop_token_ids:
            reason = STOP
        elif len(row.tokens) >= row.max_tokens:
            reason = LENGTH
        return TokenEvent(row, token, sampled.logprobs(index), reason)

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
        self.rows = [self.rows[index] for index in indices]
        self._cache.keep(indices)
        self._sampled = self._sampled.rows(indices) if self._sampled is not None and indices else None
        self.reroute()

    def _store_answer(self, index: int) -> None:
        assert self._cache is not None
        assert self.prefix_cache is not None
        row = self.rows[index]
        ids = [*row.request.ids, *row.tokens]
        length = min(self._cache.lengths[index], len(ids))
        self.prefix_cache.store(ids[:length], self._cache.extract(index, length), self._kind(row.request))

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
