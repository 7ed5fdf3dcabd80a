"""The choice of the next token: mlx-lm's filters, and randomness that belongs to a row.

What a row draws depends on its seed and on the number of the token in its answer, so an answer is the same
whatever is generated beside it, and after a restart. mlx-lm draws from one global state for all.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig

# Given all tokens so far (N,) and the logits (1, V) of the next one, makes other logits of them; as mlx-lm has it.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
_STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two tokens of an answer share a key


def choose(logits_BV: mx.array, configs: Sequence[GenerateConfig], numbers: Sequence[int]) -> mx.array:
    """The next token of each row, int32 (B,).

    Args:
        logits_BV: of any float dtype; the choice is made in float32.
        configs: of each row.
        numbers: how many tokens each row's answer has already.
    """
    if all(config.temp == 0 for config in configs):
        return mx.argmax(logits_BV, axis=-1).astype(mx.int32)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for row, config in enumerate(configs):
        alike.setdefault((config.temp, config.top_p, config.top_k, config.min_p), []).append(row)
    if len(alike) == 1:
        return _choose_alike(logits_BV, configs, numbers)
    chosen = mx.zeros((len(configs),), mx.int32)
    for rows in alike.values():
        index = mx.array(rows)
        picked = [[values[row] for row in rows] for values in (configs, numbers)]
        chosen[index] = _choose_alike(logits_BV[index], *picked)  # type: ignore[arg-type]
    return chosen


def log_probabilities(logits_BV: mx.array) -> mx.array:
    """Normalised logits, float32."""
    logits = logits_BV.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def narrowed(logprobs_BV: mx.array, config: GenerateConfig) -> mx.array:
    """Log probabilities with minus infinity for tokens that the settings exclude; mlx-lm's order."""
    if config.top_p == 1 and not config.min_p and not config.top_k:
        return logprobs_BV  # without mlx-lm, whose import takes seconds
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if config.top_p < 1:
        logprobs_BV = apply_top_p(logprobs_BV, config.top_p)
    if config.min_p > 0:
        logprobs_BV = apply_min_p(logprobs_BV, config.min_p)
    if config.top_k > 0:
        logprobs_BV = apply_top_k(logprobs_BV, config.top_k)
    return logprobs_BV


def _choose_alike(logits_BV: mx.array, configs: Sequence[GenerateConfig], numbers: Sequence[int]) -> mx.array:
    """Rows with the same settings but for the seed; adding Gumbel noise and taking the largest is sampling."""
    config = configs[0]
    if config.temp == 0:
        return mx.argmax(logits_BV, axis=-1).astype(mx.int32)
    scores = narrowed(log_probabilities(logits_BV), config) / config.temp
    keys = [mx.random.key((row.seed + number * _STRIDE) % 2**64) for row, number in zip(configs, numbers)]
    noise = mx.stack([mx.random.gumbel((logits_BV.shape[-1],), key=key) for key in keys])
    return mx.argmax(scores + noise, axis=-1).astype(mx.int32)
