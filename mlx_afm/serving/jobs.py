"""What the model is asked to do, and where what it says goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from mlx_afm.generation import GenerateConfig
from mlx_afm.serving.refusal import Refusal

Processor = Callable[[list[int], mx.array], mx.array]  # tokens said so far, logits (1, V) -> logits (1, V)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to pick tokens.

    Attributes:
        config: temperature, what narrows the choice, and the seed, of the first answer; the next ones count on from it.
        top_logprobs: how many alternatives to tell with each token's log probability; None tells neither.
        frequency_penalty, presence_penalty: taken off the logits of tokens said before, for each time and once.
        logit_bias: added to the logits of these tokens.
    """

    config: GenerateConfig = field(default_factory=GenerateConfig)
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """One token of an answer, with its log probability and the most likely alternatives if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sink(Protocol):
    """Takes one answer, token by token, in the model's thread."""

    def token(self, said: Said) -> bool:
        """Takes a token; True ends the answer here."""

    def end(self, reason: str, tokens: int) -> None:
        """The answer is over (`stop` or `length`), after so many tokens, the end mark included."""

    def fail(self, error: Refusal) -> None:
        """There will be no answer."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One request: a prompt and as many answers as it wants.

    Attributes:
        adapter: by name; None for the base.
        ids: the prompt.
        cuts: lengths of the prompt's beginnings that others may share, ascending.
        max_tokens: of each answer.
        sampling: how to pick tokens.
        ends: ids at which an answer is over.
        sinks: one per answer.
        deadline: when to give up, on the clock of `time.monotonic`.
        processor: makes what changes an answer's logits before one is picked, if anything does.
        cached_tokens: how much of the prompt was not computed again.
        cancelled: nobody waits for it any more.
    """

    adapter: str | None
    ids: list[int]
    cuts: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    ends: frozenset[int]
    sinks: Sequence[Sink]
    deadline: float
    processor: Callable[[], Processor] | None = None
    cached_tokens: int = 0
    cancelled: bool = False
