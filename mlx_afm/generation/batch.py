"""Many prompts at once: rows join the batch as others leave it, and each gives what it would give alone.

mlx-lm's batches are wrong for its own `afm7` (reuse layers ignore the padding), draw random numbers that depend on
who else is there, and know no shared prefix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_afm.errors import ConfigError
from mlx_afm.generation.answer_text import LENGTH, STOP
from mlx_afm.generation.config import GenerateConfig, require_fitting
from mlx_afm.generation.prompt_cache import PrefixCache, kind_of
from mlx_afm.generation.sampling import LogitsProcessor, choose
from mlx_afm.generation.steps import TOKENS_TO_TIDY, prefill
from mlx_afm.model import KVCache, Model
from mlx_afm.text.tokenizer import require_token_ids

BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it.

    Attributes:
        ids: the prompt.
        config: how; `kv_bits` must be the same for all that are answered together.
        logits_processors: change the logits before the choice.
    """

    ids: Sequence[int]
    config: GenerateConfig = field(default_factory=GenerateConfig)
    logits_processors: Sequence[LogitsProcessor] = ()


@dataclass(frozen=True)
class RowStep:
    """A token of one answer.

    Attributes:
        row: from `insert`.
        token: its id.
        finish_reason: "stop" with an end token, "length" with the last of `max_tokens` or of the context; else None.
    """

    row: int
    token: int
    finish_reason: str | None = None


@dataclass
class _Row:
    """One answer under way; `chosen` of its tokens are chosen, and all but the last of these are given out."""

    number: int
    request: Request
    max_tokens: int
    chosen: int = 0
    history: mx.array | None = None


class BatchGenerator:
    """Answers requests together, a token of each at a time.

        rows = BatchGenerator(model, tokenizer.eos_token_ids)
        number = rows.insert(Request(ids=ids))
        while rows.busy:
            for step in rows.step(): ...

    Args:
        model: in whose caches the rows lie.
        end_ids: ids that end an answer.
        batch_size: rows at once; others wait.
        prefix_cache: keys and values of prompts before; None to compute every prompt whole.
        owner: see `PrefixCache.fetch`.

    Cost: a prompt is computed by itself when its row joins, as it would be alone, so no time goes into padding.
    """

    def __init__(
        self,
        model: Model,
        end_ids: set[int],
        *,
        batch_size: int = BATCH_SIZE,
        prefix_cache: PrefixCache | None = None,
        owner: Hashable = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size", expected="at least 1", found=batch_size)
        self._model, self._end_ids, self.batch_size = model, set(end_ids), batch_size
        self._prefixes, self._owner = prefix_cache, owner
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._cache: list[KVCache] = []
        self._pending: mx.array | None = None  # (B,), each row's newest token, which is not in the cache yet
        self._inserted = self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether there is an answer under way or waiting."""
        return bool(self._rows or self._waiting)

    def insert(self, request: Request) -> int:
        """Takes a request, which joins the batch when there is room; its number, counted from 0.

        Raises:
            ConfigError: a prompt that is empty, fills the context or has an id outside the vocabulary, settings
                that do not fit the model, or `kv_bits` other than those of answers under way.
        """
        if not request.ids:
            raise ConfigError("an empty prompt")
        require_token_ids(request.ids, self._model.args.vocab_size, where="prompt")
        require_fitting(request.config, self._model)
        others = [row.request.config.kv_bits for row in (*self._rows, *self._waiting)]
        if any(bits != request.config.kv_bits for bits in others):
            raise ConfigError("rows of one batch differ in kv_bits", expected=others[0], found=request.config.kv_bits)
        row = _Row(self._inserted, request, request.config.answer_tokens(len(request.ids)))
        self._inserted += 1
        self._waiting.append(row)
        return row.number

    def remove(self, number: int) -> None:
        """Ends an answer early, or one that waits; one that is over already is no matter."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._keep([index for index, row in enumerate(self._rows) if row.number != number])

    def step(self) -> list[RowStep]:
        """Lets waiting rows join, and gives a token of each row; finished rows leave."""
        while self._waiting and len(self._rows) < self.batch_size:
            self._join(self._waiting.popleft())
        if not self._rows:
            return []
        assert self._pending is not None
        current, counts = self._pending, [row.chosen for row in self._rows]
        if any(row.chosen < row.max_tokens for row in self._rows):  # under way while these are looked at
            self._pending = self._choose(self._model.next_logits(current[:, None], self._cache), self._rows)
            mx.async_eval(self._pending)  # type: ignore[no-untyped-call]
        tokens: list[int] = current.tolist()  # type: ignore[assignment]
        given = [
            RowStep(row.number, token, self._finish_reason(row, token, count))
            for row, token, count in zip(self._rows, tokens, counts)
        ]
        self._keep([index for index, step in enumerate(given) if step.finish_reason is None])
        self._steps += 1
        if self._steps % TOKENS_TO_TIDY == 0:
            mx.clear_cache()
        return given

    def _finish_reason(self, row: _Row, token: int, count: int) -> str | None:
        if token in self._end_ids:
            return STOP
        return LENGTH if count == row.max_tokens else None

    def _join(self, row: _Row) -> None:
        request, ids = row.request, list(row.request.ids)
        cache, known = self._model.make_cache(quantized=request.config.kv_bits is not None), 0
        if self._prefixes is not None and (found := self._prefixes.fetch(ids, self._kind(request))) is not None:
            cache, known = found
        logits = prefill(self._model, ids[known:], cache, step_tokens=request.config.prefill_step_size)
        row.history = mx.array(ids) if request.logits_processors else None
        token = self._choose(logits, [row])
        mx.async_eval(token)  # type: ignore[no-untyped-call]
        if self._prefixes is not None:
            self._prefixes.store(ids, cache, self._kind(request))
        if self._rows:
            assert self._pending is not None
            for held, new in zip(self._cache, cache):
                held.extend(new)
            token = mx.concatenate([self._pending, token])
        else:
            self._cache = cache
        self._rows.append(row)
        self._pending = token

    def _kind(self, request: Request) -> Hashable:
        return kind_of(self._owner, request.config.kv_bits)

    def _choose(self, logits_BV: mx.array, rows: Sequence[_Row]) -> mx.array:
        if any(row.request.logits_processors for row in rows):
            parts = [self._processed(logits_BV[index : index + 1], row) for index, row in enumerate(rows)]
            logits_BV = mx.concatenate(parts)
        chosen = choose(logits_BV, [row.request.config for row in rows], [row.chosen for row in rows])
        for index, row in enumerate(rows):
            row.chosen += 1
            if row.history is not None:
                row.history = mx.concatenate([row.history, chosen[index : index + 1]])
        return chosen

    @staticmethod
    def _processed(logits_1V: mx.array, row: _Row) -> mx.array:
        for process in row.request.logits_processors:
            assert row.history is not None
            logits_1V = process(row.history, logits_1V)
        return logits_1V

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in indices]
        if not self._rows:
            self._cache, self._pending = [], None
            return
        assert self._pending is not None
        self._pending = self._pending[mx.array(indices)]
        for layer in self._cache:
            layer.filter(indices)
