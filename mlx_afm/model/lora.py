"""Low-rank adapters (LoRA) of the model's projections.

They live beside the layers because each layer owns its verbs: `to_lora` makes the adapted form of a
layer, `fuse` makes the plain one again. Deciding which layers to adapt is `mlx_afm.adapters`' task.

Arrays: `lora_a` (in, R) and `lora_b` (R, out), always float32; one pair per module and never a list,
since mlx-lm's loader accepts only names that end in `lora_a` or `lora_b`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.errors import AdapterError
from mlx_afm.model import backend
from mlx_afm.model.recompute import Dropout

PARTS = ("q", "k", "v")  # of the fused projection, in the order of its rows


class FusedProjection(Protocol):
    """A projection to queries, keys and values at once; see `projections.FusedLinear`."""

    weight: mx.array
    input_dims: int
    q_dims: int
    kv_dims: int

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values."""

    def with_weight(self, weight: mx.array) -> nn.Module:
        """A dense projection of the same form."""


def initial_lora_a(input_dims: int, rank: int, key: mx.array | None) -> mx.array:
    """Start value of `lora_a`: normal, deviation 1 / sqrt(in), as the toolkit starts."""
    return mx.random.normal((input_dims, rank), scale=1 / math.sqrt(input_dims), key=key)


def add_low_rank(
    y: mx.array, x: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: Dropout
) -> mx.array:
    """y + scale * (x A) B with one rounding at the end; A and B are used in the dtype of x."""
    return add_scaled_product(y, dropout(x) @ lora_a.astype(x.dtype), lora_b.astype(x.dtype), scale)


def add_scaled_product(y: mx.array, inner: mx.array, b: mx.array, scale: float) -> mx.array:
    """y + scale * inner b, (..., O), in one kernel.

    Cost: two products in its gradient, which scale what they add up. The gradient of `alpha` in `mx.addmm` multiplies
        arrays as large as y, which takes three times as long.
    """

    @mx.custom_function
    def add(y: mx.array, inner: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(y, inner, b, alpha=scale)

    @add.vjp
    def _(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        _, inner, b = primals
        inner_TR, cotangent_TO = inner.reshape(-1, inner.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
        inner_cotangent = backend.scaled_product(cotangent, b.T, scale, like=inner)
        return cotangent, inner_cotangent, backend.scaled_product(inner_TR.T, cotangent_TO, scale, like=b)

    return add(y, inner, b)  # type: ignore[return-value, operator]


def low_rank_delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """What the pair adds to a weight: (out, in), float32."""
    return scale * (lora_a.astype(mx.float32) @ lora_b.astype(mx.float32)).T


def weight_to_merge(linear: Any, dequantize: bool) -> mx.array:
    """The weight (out, in) that an update may be added to.

    Raises:
        AdapterError: the weight is quantized and is to stay so: every value would be rounded anew.
    """
    if "scales" not in linear:
        weight: mx.array = linear.weight
        return weight
    if not dequantize:
        advice = "Dequantize it (fuse --dequantize), or keep the adapter beside the codes."
        raise AdapterError("an adapter cannot be merged into quantized weights without moving them", advice=advice)
    return linear.dense_weight()  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """The pair of matrices of one part of the fused projection."""

    computes_in_input_dtype = True

    def __init__(self, input_dims: int, output_dims: int, rank: int, key: mx.array | None = None) -> None:
        super().__init__()
        self.lora_a = initial_lora_a(input_dims, rank, key)
        self.lora_b = mx.zeros((rank, output_dims))


class LoRALinear(nn.Module):
    """A linear layer and its low-rank update."""

    computes_in_input_dtype = True  # see `recompute`

    def __init__(
        self, linear: nn.Module, rank: int, *, scale: float, dropout: float = 0.0, key: mx.array | None = None
    ) -> None:
        super().__init__()
        output_dims, input_dims = linear.weight.shape
        if "scales" in linear:  # codes are packed into words
            input_dims = input_dims * 32 // linear.bits
        self.linear = linear
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.lora_a = initial_lora_a(input_dims, rank, key)
        self.lora_b = mx.zeros((rank, output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """The adapted projection of x (..., in)."""
        return add_low_rank(self.linear(x), x, self.lora_a, self.lora_b, self.scale, self.dropout)

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the adapted projection of x."""
        y = self.linear.plus(x, residual)
        return add_low_rank(y, x, self.lora_a, self.lora_b, self.scale, self.dropout)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """A plain linear layer with the update added to its weight in float32, rounded once."""
        weight = weight_to_merge(self.linear, dequantize)
        delta = low_rank_delta(self.lora_a, self.lora_b, self.scale)
        return self.linear.with_weight((weight.astype(mx.float32) + delta).astype(weight.dtype))


class LoRAFusedLinear(nn.Module):
    """The fused projection with up to three updates, `q`, `k` and `v`: three modules, three pairs."""

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
        for part, part_key in zip(PARTS, keys):
            if part in parts:
                output_dims = linear.q_dims if part == "q" else linear.kv_dims
                self[part] = LowRank(linear.input_dims, output_dims, rank, part_key)

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Adapted queries, keys and values; queries of `x_queries` if given."""
        sources = (x if x_queries is None else x_queries, x, x)
        q, k, v = (
            y if part not in self else self._add(self[part], y, source)
            for part, y, source in zip(PARTS, self.linear(x, x_queries), sources)
        )
        return q, k, v

    def _add(self, pair: LowRank, y: mx.array, x: mx.array) -> mx.array:
        return add_low_rank(y, x, pair.lora_a, pair.lora_b, self.scale, self.dropout)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """A plain fused projection with the updates added to its rows in float32, rounded once."""
        weight, rows = weight_to_merge(self.linear, dequantize), []
        for part in PARTS:
            size = self.linear.q_dims if part == "q" else self.linear.kv_dims
            if part in self:
                rows.append(low_rank_delta(self[part].lora_a, self[part].lora_b, self.scale))
            else:
                rows.append(mx.zeros((size, self.linear.input_dims)))
        fused = weight.astype(mx.float32) + mx.concatenate(rows)
        return self.linear.with_weight(fused.astype(weight.dtype))
