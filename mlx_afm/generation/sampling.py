"""The next token of each row, by its own settings and its own randomness: no row sees another.

What a row draws depends on its seed and on the place of the token in its answer, so an answer is the same whatever is
generated beside it, and after a restart. mlx-lm draws from one global state for all.

Shape suffixes: B rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig

# Given all tokens so far, prompt included, (N,) and the logits (1, V) of the next one, gives other logits; mlx-lm's
# form.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
_STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two tokens of an answer share a key


@dataclass(frozen=True)
class TokenLogprob:
    """One token, with its log probability and the most likely alternatives if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sampler:
    """How one answer's tokens are sampled.

    Attributes:
        config: temperature, filters, seed.
        top_logprobs: how many alternatives to give with each token's log probability; None gives neither.
        frequency_penalty, presence_penalty: taken off the logits of tokens given out before, for each time and once.
        logit_bias: added to the logits of these tokens.
        processors: change the logits first.
        prompt: ids before the answer, which the processors are given.
        tokens: of the answer so far; the engine appends them.
        error: what a processor raised.
    """

    config: GenerateConfig
    top_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    processors: Sequence[LogitsProcessor] = ()
    prompt: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether the logits depend on the tokens so far, so that these must be known first."""
        return bool(self.processors or self.frequency_penalty or self.presence_penalty or self.logit_bias)

    def processed(self, logits_1V: mx.array) -> mx.array:
        """The logits after penalties, bias and processors; as they are, and `error` set, if a processor fails."""
        amounts: defaultdict[int, float] = defaultdict(float)
        for token, count in Counter(self.tokens).items():
            amounts[token] -= count * self.frequency_penalty + self.presence_penalty
        for token, bias in self.logit_bias.items():
            amounts[token] += bias
        if any(amounts.values()):
            values = mx.array(list(amounts.values()), logits_1V.dtype)
            logits_1V = logits_1V.at[:, mx.array(list(amounts))].add(values)
        if not self.processors:
            return logits_1V
        changed, history = logits_1V, mx.array([*self.prompt, *self.tokens])
        try:  # a schema that trips its processor, in whatever way, ends one answer and no other
            for process in self.processors:
                changed = process(history, changed)
        except Exception as error:
            self.error = error
            return logits_1V
        return changed


@dataclass(frozen=True)
class SampledTokens:
    """The next token of each row, perhaps still being computed.

    Attributes:
        tokens_B: int32.
        logits_BV: that they were sampled from, before penalties and processors.
        wanted: of each row, the arrays of its log probabilities: of the token; the most likely tokens (N,); theirs
            (N,).
        processed_BV: the logits after penalties and processors.
    """

    tokens_B: mx.array
    logits_BV: mx.array
    wanted: list[tuple[mx.array, ...]]
    processed_BV: mx.array

    def read(self) -> list[TokenLogprob]:
        """The tokens; waits for them."""
        mx.eval(self.tokens_B, self.wanted)
        tokens: list[int] = self.tokens_B.tolist()  # type: ignore[assignment]
        return [_token_logprob(token, arrays) for token, arrays in zip(tokens, self.wanted)]

    def processed(self, row: int) -> mx.array:
        """The logits (1, V) of a row after penalties and processors."""
        return self.processed_BV[row : row + 1]

    def rows(self, indices: Sequence[int]) -> SampledTokens:
        """Those of some rows, in this order."""
        index = mx.array(list(indices))
        wanted = [self.wanted[row] for row in indices]
        return SampledTokens(self.tokens_B[index], self.logits_BV[index], wanted, self.processed_BV[index])

    def joined(self, other: SampledTokens) -> SampledTokens:
        """Those of other rows behind these."""
        pairs = (
            (self.tokens_B, other.tokens_B),
            (self.logits_BV, other.logits_BV),
            (self.processed_BV, other.processed_BV),
        )
        tokens_B, logits_BV, processed_BV = (mx.concatenate(list(pair)) for pair in pairs)
        return SampledTokens(tokens_B, logits_BV, self.wanted + other.wanted, processed_BV)


def sample(samplers: Sequence[Sampler], logits_BV: mx.array, places: Sequence[int]) -> SampledTokens:
    """The next token of each row, under way when this returns.

    Args:
        samplers: of each row.
        logits_BV: of any float dtype; what is drawn is computed in float32.
        places: of the token in each row's answer, from 0.
    """
    processed_BV = logits_BV
    if any(sampler.changes_logits for sampler in samplers):
        rows = [
            sampler.processed(logits_BV[row : row + 1]) if sampler.changes_logits else logits_BV[row : row + 1]
            for row, sampler in enumerate(samplers)
        ]
        processed_BV = mx.concatenate(rows)
    tokens_B = choose_tokens(processed_BV, [sampler.config for sampler in samplers], places)
    return sampled_tokens(samplers, tokens_B, logits_BV, processed_BV)


def sampled_tokens(
    samplers: Sequence[Sampler], tokens_B: mx.array, logits_BV: mx.array, processed_BV: mx.array
) -> SampledTokens:
    """Tokens that were sampled from some logits, with the log probabilities that the rows want, under way."""
    wanted = [
        () if sampler.top_logprobs is None else _logprobs(logits_BV[row], tokens_B[row], sampler.top_logprobs)
        for row, sampler in enumerate(samplers)
    ]
    mx.async_eval(tokens_B, wanted)  # type: ignore[no-untyped-call]
    return SampledTokens(tokens_B, logits_BV, wanted, processed_BV)


def choose_tokens(logits_BV: mx.array, configs: Sequence[GenerateConfig], places: Sequence[int]) -> mx.array:
    """The next token of each row, int32 (B,); not evaluated."""
    if all(config.temp == 0 for config in configs):
        return mx.argmax(logits_BV, axis=-1).astype(mx.int32)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for row, config in enumerate(configs):
        alike.setdefault((config.temp, config.top_p, config.top_k, config.min_p), []).append(row)
    if len(alike) == 1:
        return _choose_alike(logits_BV, configs, places)
    chosen = mx.zeros((len(configs),), mx.int32)
    for rows in alike.values():
        index = mx.array(rows)
        picked = [[values[row] for row in rows] for values in (configs, places)]
        chosen[index] = _choose_alike(logits_BV[index], *picked)  # type: ignore[arg-type]
    return chosen


def log_probabilities(logits_BV: mx.array) -> mx.array:
    """Normalized logits, float32."""
    logits = logits_BV.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def import_filters(config: GenerateConfig) -> None:
    """Imports what `filter_logits` needs for these settings: mlx-lm, which takes seconds the first time."""
    if _filters(config):
        import mlx_lm.sample_utils  # noqa: F401


def _filters(config: GenerateConfig) -> bool:
    return config.top_p < 1 or config.min_p > 0 or config.top_k > 0


def filter_logits(logprobs_BV: mx.array, config: GenerateConfig) -> mx.array:
    """Log probabilities with minus infinity for tokens that the settings exclude; mlx-lm's order."""
    if not _filters(config):
        return logprobs_BV
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if config.top_p < 1:
        logprobs_BV = apply_top_p(logprobs_BV, config.top_p)
    if config.min_p > 0:
        logprobs_BV = apply_min_p(logprobs_BV, config.min_p)
    if config.top_k > 0:
        logprobs_BV = apply_top_k(logprobs_BV, config.top_k)
    return logprobs_BV


def _choose_alike(logits_BV: mx.array, configs: Sequence[GenerateConfig], places: Sequence[int]) -> mx.array:
    """Rows with the same settings but for the seed; adding Gumbel noise and taking the largest is sampling."""
    config = configs[0]
    if config.temp == 0:
        return mx.argmax(logits_BV, axis=-1).astype(mx.int32)
    scores = filter_logits(log_probabilities(logits_BV), config) / config.temp
    keys = [mx.random.key((row.seed + place * _STRIDE) % 2**64) for row, place in zip(configs, places)]
    noise = mx.stack([mx.random.gumbel((logits_BV.shape[-1],), key=key) for key in keys])
    return mx.argmax(scores + noise, axis=-1).astype(mx.int32)


def _logprobs(logits_V: mx.array, token: mx.array, alternatives: int) -> tuple[mx.array, ...]:
    logprobs_V = log_probabilities(logits_V)
    if not alternatives:
        return (logprobs_V[token],)
    best_N = mx.argpartition(-logprobs_V, kth=alternatives - 1)[:alternatives]
    return logprobs_V[token], best_N, logprobs_V[best_N]


def _token_logprob(token: int, arrays: tuple[mx.array, ...]) -> TokenLogprob:
    if not arrays:
        return TokenLogprob(token)
    top: list[tuple[int, float]] = list(zip(*(array.tolist() for array in arrays[1:])))  # type: ignore[arg-type]
    logprob: float = arrays[0].item()  # type: ignore[assignment]
    return TokenLogprob(token, logprob, tuple(sorted(top, key=lambda pair: (-pair[1], pair[0]))))
