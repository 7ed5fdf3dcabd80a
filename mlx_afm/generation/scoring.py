"""Log probabilities of given tokens: what the model makes of a text that it did not write.

Shape suffixes: L tokens, D model, V vocabulary, N alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_afm.generation.sampling import TokenLogprob, log_probabilities
from mlx_afm.model import Model

CHUNK_TOKENS = 64  # whose logits exist at the same time: 38 MB in float32 at 153,600 tokens


def score_tokens(model: Model, hidden_LD: mx.array, targets: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """The log probability of each target after the token at its place, with the most likely alternatives.

    Args:
        model: makes logits of hidden states.
        hidden_LD: final hidden states of the tokens before the targets.
        targets: as many ids.
        alternatives: how many to give with each.
    """
    scored: list[TokenLogprob] = []
    for start in range(0, len(targets), CHUNK_TOKENS):
        wanted = list(targets[start : start + CHUNK_TOKENS])
        logprobs_LV = log_probabilities(model.logits(hidden_LD[start : start + len(wanted)]))
        values_L1 = mx.take_along_axis(logprobs_LV, mx.array(wanted)[:, None], axis=-1)
        tops_LN = mx.argpartition(-logprobs_LV, kth=alternatives, axis=-1)[:, :alternatives]
        top_values_LN = mx.take_along_axis(logprobs_LV, tops_LN, axis=-1)
        mx.eval(values_L1, tops_LN, top_values_LN)
        columns: Any = (wanted, values_L1.tolist(), tops_LN.tolist(), top_values_LN.tolist())
        for token, (value,), ids, top_values in zip(*columns):
            scored.append(TokenLogprob(token, value, tuple(sorted(zip(ids, top_values), key=_by_likelihood))))
    return scored


def _by_likelihood(alternative: tuple[int, float]) -> tuple[float, int]:
    return -alternative[1], alternative[0]
