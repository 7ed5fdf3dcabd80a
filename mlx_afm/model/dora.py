"""Weight-decomposed adapters (DoRA): the direction by a low-rank update, the length of each row by `m`.

y = m / |W + s (A B)^T| * (W x + s B^T A^T x), the length by row and taken as a constant in the
gradient. Arrays beside `lora_a` and `lora_b`: `m` (out,), float32, mlx-lm's name.

The rows' lengths come from |w|^2 + 2 s (w A) b + s^2 b^T (A^T A) b, so no second weight is ever made;
|w|^2 is computed once. At B = 0 the length is exactly `m`, and the output is exactly the plain layer's.

Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3; checked against a float64 loop and mlx-lm's layer.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model.lora import (
    PARTS,
    FusedProjection,
    LowRank,
    add_low_rank,
    initial_lora_a,
    low_rank_delta,
    weight_to_merge,
)
from mlx_afm.model.recompute import Dropout

SMALLEST = 1e-30  # squared length


def dense_weight(linear: Any) -> mx.array:
    """The weight (out, in) of a linear layer, whatever it is stored as."""
    weight: mx.array = linear.dense_weight() if "scales" in linear else linear.weight
    return weight


def squared_rows(weight: mx.array) -> mx.array:
    """Squared length of each row, float32 (out,)."""
    return mx.sum(mx.square(weight.astype(mx.float32)), axis=1)


def adapted_lengths(weight: mx.array, squares: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """Length of each row of W + s (A B)^T, float32 (out,); no gradient.

    Cost: one product (out, in) x (in, R); no array of the weight's size beyond a float32 copy that is
    needed for 16-bit weights.
    """
    crossed = mx.sum((weight.astype(mx.float32) @ lora_a) * lora_b.T, axis=1)
    own = mx.sum((lora_b.T @ (lora_a.T @ lora_a)) * lora_b.T, axis=1)
    return mx.stop_gradient(_root(squares + 2 * scale * crossed + scale * scale * own))


def _root(squares: mx.array) -> mx.array:
    """The square root, never zero: a row of zeros has length 0 in `m` and stays zero."""
    return mx.sqrt(mx.maximum(squares, SMALLEST))


def fused_rows(weight: mx.array, lora_a: mx.array, lora_b: mx.array, m: mx.array, scale: float) -> mx.array:
    """The rows with update and length, float32 (out, in)."""
    rows = weight.astype(mx.float32) + low_rank_delta(lora_a, lora_b, scale)
    return rows * (m / _root(squared_rows(rows)))[:, None]


class DoRALinear(nn.Module):
    """A linear layer, its low-rank update and its magnitudes."""

    def __init__(
        self, linear: nn.Module, rank: int, *, scale: float, dropout: float = 0.0, key: mx.array | None = None
    ) -> None:
        super().__init__()
        weight = dense_weight(linear)
        output_dims, input_dims = weight.shape
        self.linear = linear
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.lora_a = initial_lora_a(input_dims, rank, key)
        self.lora_b = mx.zeros((rank, output_dims))
        self._squares = squared_rows(weight)
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """The adapted projection of x (..., in)."""
        y = add_low_rank(self.linear(x), x, self.lora_a, self.lora_b, self.scale, self.dropout)
        lengths = adapted_lengths(dense_weight(self.linear), self._squares, self.lora_a, self.lora_b, self.scale)
        return (self.m / lengths).astype(x.dtype) * y

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the projection of x."""
        return residual + self(x)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """A plain linear layer of the adapted weight, made in float32 and rounded once."""
        weight = weight_to_merge(self.linear, dequantize)
        fused = fused_rows(weight, self.lora_a, self.lora_b, self.m, self.scale)
        return self.linear.with_weight(fused.astype(weight.dtype))


class LengthLowRank(LowRank):
    """The pair of matrices and the magnitudes of one part of the fused projection."""

    def __init__(self, rows: mx.array, rank: int, key: mx.array | None = None) -> None:
        super().__init__(rows.shape[1], rows.shape[0], rank, key)
        self._squares = squared_rows(rows)
        self.m = mx.sqrt(self._squares)


class DoRAFusedLinear(nn.Module):
    """The fused projection with up to three updates, `q`, `k` and `v`, each with its own magnitudes."""

    def __init__(
        self,
        linear: FusedProjection,
        rank: int,
        *,
        scale: float,
        dropout: float = 0.0,
        parts: tuple[str, ...] = PARTS,
        key: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = Dropout(dropout)
        keys = [None] * len(PARTS) if key is None else mx.random.split(key, len(PARTS))
        for part, part_key, rows in zip(PARTS, keys, self._rows()):
            if part in parts:
                self[part] = LengthLowRank(rows, rank, part_key)

    def _rows(self) -> list[mx.array]:
        """The weight's rows for queries, keys and values."""
        linear = self.linear
        return list(mx.split(dense_weight(linear), [linear.q_dims, linear.q_dims + linear.kv_dims]))

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Adapted queries, keys and values; queries of `x_queries` if given."""
        sources = (x if x_queries is None else x_queries, x, x)
        q, k, v = (
            y if part not in self else self._adapt(self[part], y, source, rows)
            for part, y, source, rows in zip(PARTS, self.linear(x, x_queries), sources, self._rows())
        )
        return q, k, v

    def _adapt(self, pair: LengthLowRank, y: mx.array, x: mx.array, rows: mx.array) -> mx.array:
        y = add_low_rank(y, x, pair.lora_a, pair.lora_b, self.scale, self.dropout)
        lengths = adapted_lengths(rows, pair._squares, pair.lora_a, pair.lora_b, self.scale)
        return (pair.m / lengths).astype(x.dtype) * y

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """A plain fused projection of the adapted weights, made in float32 and rounded once."""
        weight, made = weight_to_merge(self.linear, dequantize), []
        for part, rows in zip(PARTS, self._rows()):
            pair = self.get(part)
            made.append(
                rows.astype(mx.float32)
                if pair is None
                else fused_rows(rows, pair.lora_a, pair.lora_b, pair.m, self.scale)
            )
        return self.linear.with_weight(mx.concatenate(made).astype(weight.dtype))
