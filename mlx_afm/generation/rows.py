"""What is asked of the engine, the answers under way, and the tokens that it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.sampling import LogitsProcessor, Sampler, TokenLogprob, log_probabilities

FinishReason = Literal["stop", "length"]
STOP: Final = "stop"
LENGTH: Final = "length"

Progress = Callable[[int, int], None]  # tokens of the prompt computed, and of how many that were not known before


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it.

    Attributes:
        ids: the prompt.
        samplers: one for each answer wanted; they share the prompt's computation. Without any there is one, of `config`
            and `logits_processors`.
        max_tokens: of each answer; None for what `config` and the context leave. 0 computes the prompt alone.
        config: prefill size, cache kind and context; how to sample, where `samplers` are not given.
        logits_processors: see `Sampler`.
        stop_token_ids: ids that end an answer.
        adapter: a name that the routes know; None for the base.
        prefix_boundaries: lengths of the prompt's beginnings that other prompts may share, ascending. The prompt is
            always computed from boundary to boundary, so that an answer has the same bits whether one was held or not.
            None shares any common beginning.
        prompt_logprobs: how many alternatives to give with the log probability of each prompt token; None gives
            neither.
        scored_from: place of the first prompt token whose log probability is wanted, at least 1. The tokens before the
            one in front of it may come from the prefix cache, if `prefix_boundaries` say so.
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
    prompt_logprobs: int | None = None
    scored_from: int = 1
    on_progress: Progress | None = None


@dataclass(eq=False)
class Row:
    """One answer under way.

    Attributes:
        request, sampler: what was asked for.
        max_tokens: of the answer.
        tokens: given out so far.
        cached_tokens: of the prompt, how many came from the prefix cache.
        prompt_logprobs: of each token of the prompt from `scored_from` on, if they were asked for.
    """

    request: Request
    sampler: Sampler
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprob] = ()

    def ids(self, start: int, end: int) -> list[int]:
        """Some ids of prompt and answer, without making a list of all."""
        prompt = len(self.request.ids)
        return [*self.request.ids[start:end], *self.tokens[max(start - prompt, 0) : max(end - prompt, 0)]]

    @property
    def length(self) -> int:
        """Tokens of the prompt, and of the answer as far as it was given out."""
        return len(self.request.ids) + len(self.tokens)


@dataclass(frozen=True)
class TokenEvent:
    """A token of a row.

    Attributes:
        row: whose.
        token: its id, with log probabilities if the row's sampler asks for them; -1 for none.
        processed_1V: gives the logits after penalties and processors; None for an error.
        finish_reason: "stop" with a stop token, "length" with the last token of `max_tokens`; else None. A finished row
            has left.
        from_draft: whether a draft model proposed it.
        error: why the row ended without this token; its logits could not be processed.
    """

    row: Row
    token: TokenLogprob
    processed_1V: Callable[[], mx.array] | None = None
    finish_reason: FinishReason | None = None
    from_draft: bool = False
    error: Exception | None = None

    @property
    def logprobs_V(self) -> mx.array | None:
        """Log probabilities of all tokens, float32, not evaluated: nothing is made for tokens of which nobody asks."""
        return None if self.processed_1V is None else log_probabilities(self.processed_1V())[0]
