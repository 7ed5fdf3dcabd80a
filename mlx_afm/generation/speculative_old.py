"""Speculative decoding: a small model proposes tokens, and one pass of the large one judges them all.

Greedy, the answer is the large model's own. Sampled, it is distributed as the large model's is, whatever the small
one proposes. mlx-lm samples from both and keeps what happens to be equal: right too, but with sum(p q) of the
proposals kept instead of sum(min(p, q)); and it cuts a combined cache at the wrong place for this architecture.

Shape suffixes: N proposed tokens, M one more, V vocabulary.
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023, algorithm 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.sampling import LogitsProcessor, choose, log_probabilities, narrowed
from mlx_afm.generation.speculation import Speculation
from mlx_afm.generation.steps import TOKENS_TO_TIDY, Progress, Step, prefill
from mlx_afm.model import Model

_STRIDE = 0xD1342543DE82EF95  # odd, and another than of plain sampling
PLAIN_STEPS = 4  # timed for a comparison, after one that is not


def iter_speculative_steps(
    model: Model,
    ids: Sequence[int],
    config: GenerateConfig,
    speculation: Speculation,
    *,
    cache: Sequence[Any],
    cached_tokens: int = 0,
    draft_cache: Sequence[Any] | None = None,
    max_tokens: int,
    logits_processors: Sequence[LogitsProcessor] = (),
    on_progress: Progress | None = None,
) -> Iterator[Step]:
    """The tokens that follow a prompt; like `iter_steps`, but several for one pass of the model.

    Args:
        model: the target.
        ids: all of the prompt.
        config: how to choose.
        speculation: the draft model; counts rounds and tokens.
        cache: the target's, holds the first `cached_tokens` ids, fewer than there are. Afterwards, also when the
            caller stops early, it holds the prompt and all tokens given out but the last.
        draft_cache: the draft model's, holds a beginning of the ids; afterwards no more than the target's does.
        max_tokens: how many to give.
        logits_processors: change the logits of both models before the choice. They are called with fewer tokens
            again after proposals were refused.
        on_progress: told of the target's prompt.

    Cost: one wait for the device in each round, and one for each token with processors that look at tokens. The
        draft's prompt is computed besides the target's.
    """
    draft_cache = speculation.draft.make_cache() if draft_cache is None else draft_cache
    logits = prefill(model, ids[cached_tokens:], cache, step_tokens=config.prefill_step_size, on_progress=on_progress)
    known = draft_cache[0].size()
    prefill(speculation.draft, ids[known:], draft_cache, step_tokens=config.prefill_step_size)
    loop = _Loop(model, config, speculation, cache, draft_cache, logits_processors, list(ids))
    given = 0
    try:
        steps = loop.first(logits)
        while True:
            for step in steps:
                given += 1
                yield step
            if given == max_tokens:
                return
            if given // TOKENS_TO_TIDY > (given - len(steps)) // TOKENS_TO_TIDY:
                mx.clear_cache()
            length = min(speculation.next_length(model), max_tokens - given - 1)
            steps = loop.round(length) if length else loop.alone()
    finally:
        held = len(ids) + max(given - 1, 0)
        rewind(cache, held)
        rewind(draft_cache, held)


@dataclass
class _Loop:
    """What is known between rounds: all tokens so far, of which the caches hold all but the last few."""

    model: Model
    config: GenerateConfig
    speculation: Speculation
    cache: Sequence[Any]
    draft_cache: Sequence[Any]
    processors: Sequence[LogitsProcessor]
    tokens: list[int]
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    def first(self, logits_1V: mx.array) -> list[Step]:
        """The token after the prompt."""
        logits = self._processed(logits_1V, [])
        token = choose(logits, [self.config], [len(self.tokens) - self.prompt_tokens])
        self.tokens.append(int(token.item()))  # type: ignore[arg-type]
        return [Step(self.tokens[-1], log_probabilities(logits)[0])]

    def alone(self) -> list[Step]:
        """One token of the target's own."""
        return self.first(self.model.next_logits(mx.array([self.tokens[-1:]]), self.cache))

    def round(self, length: int) -> list[Step]:
        """The tokens that one pass of the target gives: those it accepts of some proposed ones, and one of its own."""
        started, number = time.perf_counter(), len(self.tokens) - self.prompt_tokens
        keys = mx.random.split(mx.random.key((self.config.seed + number * _STRIDE) % 2**64), length + 1)
        proposed, drafted = self._propose(length, keys)
        inputs = mx.concatenate([mx.array(self.tokens[-1:], mx.int32), *proposed])
        judged = self.model(inputs[None], self.cache)[0]
        if self.processors:
            rows = [self._processed(judged[row : row + 1], proposed[:row]) for row in range(length + 1)]
            judged = mx.concatenate(rows)
        if self.config.temp == 0:
            accepted, own = verify_greedy(judged, inputs[1:])
        else:
            draft_NV = mx.stack([self._probabilities(logits)[0] for logits in drafted])
            accepted, own = verify_sampled(self._probabilities(judged), draft_NV, inputs[1:], keys[-1])
        mx.eval(inputs, accepted, own)  # the one wait
        count = int(accepted.item())  # type: ignore[arg-type]
        logprobs = log_probabilities(judged)
        new = [*inputs[1 : count + 1].tolist(), int(own.item())]  # type: ignore[misc, arg-type]
        self.tokens += new
        rewind(self.cache, len(self.tokens) - 1)
        rewind(self.draft_cache, len(self.tokens) - 1)
        self.speculation.add_round(length, count, time.perf_counter() - started)
        return [Step(token, logprobs[row], row < count) for row, token in enumerate(new)]

    def _propose(self, length: int, keys: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        """Tokens (1,) that the draft model would say, and the logits (1, V) it chose them by; nothing is waited for."""
        proposed: list[mx.array] = []
        drafted: list[mx.array] = []
        inputs = mx.array(self.tokens[self.draft_cache[0].size() :], mx.int32)  # one, or what it did not see accepted
        for place in range(length):
            logits = self._processed(self.speculation.draft.next_logits(inputs[None], self.draft_cache), proposed)
            scores = logits
            if self.config.temp > 0:
                scores = mx.log(self._probabilities(logits)) + mx.random.gumbel(logits.shape, key=keys[place])
            inputs = mx.argmax(scores, axis=-1).astype(mx.int32)
            mx.async_eval(inputs)  # type: ignore[no-untyped-call]
            proposed.append(inputs)
            drafted.append(logits)
        return proposed, drafted

    def _processed(self, logits_1V: mx.array, proposed: Sequence[mx.array]) -> mx.array:
        """Logits as the processors make them after all tokens and these."""
        if not self.processors:
            return logits_1V
        history = mx.concatenate([mx.array(self.tokens), *proposed])
        for process in self.processors:
            logits_1V = process(history, logits_1V)
        return logits_1V

    def _probabilities(self, logits: mx.array) -> mx.array:
        """Of every token to be sampled, (..., V) float32: what plain sampling with these settings draws from."""
        return mx.softmax(narrowed(log_probabilities(logits), self.config) / self.config.temp, axis=-1)


def verify_greedy(judged_MV: mx.array, proposed_N: mx.array) -> tuple[mx.array, mx.array]:
    """How many proposed tokens the target would have chosen itself, and its choice after these.

    Args:
        judged_MV: the target's logits after the last token and after each proposed one.
        proposed_N: one less.

    Returns: two int32 scalars.
    """
    best_M = mx.argmax(judged_MV, axis=-1).astype(mx.int32)
    accepted = mx.cumprod((best_M[:-1] == proposed_N).astype(mx.int32)).sum()
    return accepted, best_M[accepted]


def verify_sampled(
    target_MV: mx.array, draft_NV: mx.array, proposed_N: mx.array, key: mx.array
) -> tuple[mx.array, mx.array]:
    """How many tokens drawn from the draft's probabilities to accept, and the token after these.

    A token is accepted with probability min(1, target / draft). After the first that is not, one is drawn from
    max(target - draft, 0), brought to the sum 1; after the last, from the target's. So each token given out has the
    target's probability.

    Args:
        target_MV: the target's probabilities after the last token and after each proposed one, float32.
        draft_NV: the draft's, from which the proposed tokens were drawn.
        proposed_N: these.
        key: of the randomness.

    Returns: two int32 scalars.
    """
    count = proposed_N.shape[0]
    roll_key, own_key = mx.random.split(key)
    rolls_N = mx.random.uniform(shape=(count,), key=roll_key)
    target_N = mx.take_along_axis(target_MV[:count], proposed_N[:, None], axis=-1)[:, 0]
    draft_N = mx.take_along_axis(draft_NV, proposed_N[:, None], axis=-1)[:, 0]
    accepted = mx.cumprod((rolls_N * draft_N < target_N).astype(mx.int32)).sum()
    left_MV = mx.maximum(target_MV - mx.pad(draft_NV, [(0, 1), (0, 0)]), 0)
    left_V, target_V = left_MV[accepted], target_MV[accepted]
    left_V = mx.where(left_V.sum() > 0, left_V, target_V)  # equal up to rounding: nothing is left of the difference
    own = mx.argmax(mx.log(left_V) + mx.random.gumbel(left_V.shape, key=own_key))
    return accepted, own.astype(mx.int32)


def rewind(cache: Sequence[Any], tokens: int) -> None:
    """Makes every layer's cache forget what comes after these tokens."""
    for layer in cache:
        if layer.size() > tokens:
            layer.trim(layer.size() - tokens)


def plain_step_seconds(model: Model, cache: Sequence[Any], token: int) -> float:
    """What a token takes without speculation, behind what the cache holds; the cache stays as it is.

    Cost: five such steps.
    """
    held, started = cache[0].size(), 0.0
    for step in range(PLAIN_STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        mx.eval(mx.argmax(model.next_logits(mx.array([[token]]), cache), axis=-1))
        rewind(cache, held)
    return (time.perf_counter() - started) / PLAIN_STEPS
