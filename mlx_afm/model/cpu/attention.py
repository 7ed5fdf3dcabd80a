"""Attention to given keys and values on MLX's CPU backend, which has no kernel of its own for it.

There `mx.fast.scaled_dot_product_attention` is a chain of plain operations with a slow exponential. The same chain
with a quick one, all heads of a key head in one product, and its gradient written out takes half the time.

Shape suffixes: G groups of queries that share their keys, H query heads, K key heads, N queries, S keys,
E head width, R rows: the queries of all heads that share a key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_afm.model.cpu.exponential import LOG2_E

MIN_QUERIES = 16  # with fewer, as in decoding, MLX's chain of operations is shorter and quicker
CAUSAL_QUERIES = 128  # of a causal mask at a time: with the keys up to them alone, half of all scores are not computed
HIDDEN = -1e30  # score of a key that is not visible: finite, since what is above an infinite highest one is NaN


def attention_on_cpu(
    q_GHNE: mx.array, k_GKSE: mx.array, v_GKSE: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """softmax(q k^T * scale) v, (G, H, N, E), computed in float32 and rounded once to q's dtype.

    Args:
        mask: bool, broadcast to (G, 1, N, S); "causal", the last query standing at the last key; None for all.

    Cost: nothing is kept for the gradient but what goes in; it does not use what comes out either, so that a
        caller who recomputes queries in the backward pass does not compute the attention again.
    """
    queries, keys = q_GHNE.shape[2], k_GKSE.shape[2]
    if not isinstance(mask, str):
        return _attend(q_GHNE, k_GKSE, v_GKSE, scale, mask)
    ends = [*range(CAUSAL_QUERIES, queries, CAUSAL_QUERIES), queries]
    parts = []
    for q, end in zip(mx.split(q_GHNE, ends[:-1], axis=2), ends):
        seen = slice(0, keys - queries + end)
        causal = mx.arange(seen.stop - q.shape[2], seen.stop)[:, None] >= mx.arange(seen.stop)
        parts.append(_attend(q, k_GKSE[:, :, seen], v_GKSE[:, :, seen], scale, causal))
    return mx.concatenate(parts, axis=2)


def _attend(q_GHNE: mx.array, k_GKSE: mx.array, v_GKSE: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    groups, heads, queries, width = q_GHNE.shape
    key_heads, keys = k_GKSE.shape[1:3]
    q_GKRE = (q_GHNE.astype(mx.float32) * (scale * LOG2_E)).reshape(groups, key_heads, -1, width)
    # The mask gets an axis for the heads of a key head: (G or 1, 1, 1, N, S).
    visible = None if mask is None else mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)[:, :, None]
    attend = _attention(visible, (groups, key_heads, heads // key_heads, queries, keys))
    out = attend(q_GKRE, k_GKSE.astype(mx.float32), v_GKSE.astype(mx.float32))
    return out.reshape(q_GHNE.shape).astype(q_GHNE.dtype)


def _attention(visible: mx.array | None, shape: Sequence[int]) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Attention of queries (G, K, R, E) scaled so that 2 is raised to the scores; `shape` has its heads apart."""

    def powers(q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
        """2^(score - highest), and the sum over the keys; infinite for a query that sees none, which gives zeros."""
        scores = q @ k.swapaxes(-1, -2)
        if visible is not None:
            scores = mx.where(visible, scores.reshape(shape), HIDDEN).reshape(scores.shape)
        highest = mx.max(scores, axis=-1, keepdims=True)
        raised = mx.power(2.0, scores - highest)
        return raised, mx.where(highest > HIDDEN, mx.sum(raised, axis=-1, keepdims=True), math.inf)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        raised, sums = powers(q, k)
        return (raised @ v) / sums

    def gradients(
        primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        raised, sums = powers(q, k)
        cotangent = cotangent / sums
        products = raised * (cotangent @ v.swapaxes(-1, -2))
        errors = products - raised * (mx.sum(products, axis=-1, keepdims=True) / sums)
        ln2 = math.log(2)
        return (errors @ k) * ln2, (errors.swapaxes(-1, -2) @ q) * ln2, raised.swapaxes(-1, -2) @ cotangent

    attend.vjp(gradients)
    return attend  # type: ignore[return-value]
