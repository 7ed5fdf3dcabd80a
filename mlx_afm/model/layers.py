"""Building blocks that are the same in both kinds of layers.

Shape suffixes: B batch, L tokens, H heads, E head width, D model width.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_afm.model.config import AFMConfig
from mlx_afm.model.exponential import on_cpu, sigmoid
from mlx_afm.model.lora import LoRAFusedLinear, LoRALinear
from mlx_afm.model.recompute import recomputed


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 including the weight, rounded once.

    `mlx.nn.RMSNorm` rounds the normalised value before it multiplies by the weight, which in
    16 bits is off by up to one unit in the last place, and returns float32 for a float32 weight.
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """The normalised x, in x's dtype."""
        if x.dtype == self.weight.dtype == mx.float32:  # nothing to cast, which in decoding is noticed
            return mx.fast.rms_norm(x, self.weight, self.eps)
        y = mx.fast.rms_norm(x.astype(mx.float32), self.weight.astype(mx.float32), self.eps)
        return y.astype(x.dtype)


def _initial_weight(output_dims: int, input_dims: int) -> mx.array:
    return mx.random.normal((output_dims, input_dims), scale=1 / math.sqrt(input_dims))


def _quantize(module: nn.Module, group_size: int | None, bits: int | None, mode: str, **others: Any) -> nn.Module:
    from mlx_afm.model.quantized import quantize_module  # late: it is built on these layers

    return quantize_module(module, group_size, bits, mode, **others)


class Linear(nn.Linear):
    """A linear layer without bias that knows its adapted form."""

    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__(input_dims, output_dims, bias=False)
        self.weight = _initial_weight(output_dims, input_dims)

    def to_lora(self, r: int = 32, scale: float = 0.5, dropout: float = 0.0, key: mx.array | None = None) -> LoRALinear:
        """This layer with a low-rank update of rank r (argument names are mlx-lm's)."""
        return LoRALinear(self, r, scale=scale, dropout=dropout, key=key)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This layer over quantised weights (argument names are mlx-lm's)."""
        return _quantize(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> Linear:
        """A layer of the same form with another weight."""
        other = Linear(1, 1)
        other.weight = weight
        return other


class Embedding(nn.Embedding):
    """The embedding, which is also the head, that knows its quantised form."""

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This table over quantised weights (argument names are mlx-lm's)."""
        return _quantize(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> Embedding:
        """A table of the same form with another weight."""
        other = Embedding(1, 1)
        other.weight = weight
        return other


class FusedLinear(nn.Module):
    """One matrix that makes queries, keys and values; its rows are in this order.

    A module of its own, not an `nn.Linear`: it returns three arrays, and everything that replaces
    linear layers by their class must leave it alone.
    """

    def __init__(self, input_dims: int, q_dims: int, kv_dims: int) -> None:
        super().__init__()
        self.q_dims, self.kv_dims = q_dims, kv_dims
        self.weight = _initial_weight(q_dims + 2 * kv_dims, input_dims)

    @property
    def input_dims(self) -> int:
        """Width of the input."""
        return int(self.weight.shape[-1])

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        if x_queries is None:
            q, k, v = mx.split(x @ self.weight.T, [self.q_dims, self.q_dims + self.kv_dims], axis=-1)
        else:
            q = x_queries @ self.weight[: self.q_dims].T
            k, v = mx.split(x @ self.weight[self.q_dims :].T, 2, axis=-1)
        return q, k, v

    def to_lora(
        self,
        r: int = 32,
        scale: float = 0.5,
        dropout: float = 0.0,
        parts: tuple[str, ...] = ("q", "k", "v"),
        key: mx.array | None = None,
    ) -> LoRAFusedLinear:
        """This layer with a low-rank update of rank r for each of `parts`."""
        return LoRAFusedLinear(self, r, scale=scale, dropout=dropout, parts=parts, key=key)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This layer over quantised weights (argument names are mlx-lm's)."""
        return _quantize(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> FusedLinear:
        """A layer of the same form with another weight."""
        other = FusedLinear(1, self.q_dims, self.kv_dims)
        other.weight = weight
        return other


class FeedForward(nn.Module):
    """down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_dim, config.feed_forward_dim)
        self.up_proj = Linear(config.hidden_dim, config.feed_forward_dim)
        self.down_proj = Linear(config.feed_forward_dim, config.hidden_dim)

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """The feed-forward of x after `norm`, (..., D) to (..., D).

        Cost: of the values between, those of the gate and up projections alone are kept for the backward pass, and on
        the CPU, where sigmoids are slow, the slopes of the activation.
        """

        def widen(x: mx.array) -> tuple[mx.array, mx.array]:
            normed = norm(x)
            return self.gate_proj(normed), self.up_proj(normed)

        gate, up = recomputed([norm, self.gate_proj, self.up_proj], widen, x)
        if self.training and on_cpu():
            return recomputed([self.down_proj], lambda open, up: self.down_proj(open * up), kept_silu(gate), up)
        return recomputed([self.down_proj], lambda gate, up: self.down_proj(swiglu(gate, up)), gate, up)


def kept_silu(gate: mx.array) -> mx.array:
    """silu(gate). Its slopes are computed at once, and kept for the gradient in the place of the gate."""
    outputs: tuple[mx.array, mx.array] = _silu_and_slope(gate)  # type: ignore
    return outputs[0]


@mx.custom_function
def _silu_and_slope(gate: mx.array) -> tuple[mx.array, mx.array]:
    return _times_with_slope(gate, sigmoid(gate))


@_silu_and_slope.vjp
def _by_slope(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
    return cotangents[0] * outputs[1]


@partial(mx.compile, shapeless=True)  # one pass over arrays of the feed-forward's width
def _times_with_slope(gate: mx.array, opening: mx.array) -> tuple[mx.array, mx.array]:
    activated = gate * opening
    return activated, opening + activated * (1 - opening)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. The sigmoid is computed once and serves the gradient too."""
    return _gated(gate, mx.stop_gradient(sigmoid(gate)), up)  # type: ignore[return-value, operator]


@mx.custom_function
def _gated(gate: mx.array, opening: mx.array, up: mx.array) -> mx.array:
    return _gate_times_up(gate, opening, up)


@_gated.vjp
def _gate_and_up(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of `gate` goes by the sigmoid as well; the sigmoid as an argument therefore gets none."""
    gate, opening, up = primals
    gate_gradient, up_gradient = _gated_gradients(gate, opening, up, cotangent)
    return gate_gradient, mx.zeros_like(opening), up_gradient


@partial(mx.compile, shapeless=True)
def _gate_times_up(gate: mx.array, opening: mx.array, up: mx.array) -> mx.array:
    return gate * opening * up


@partial(mx.compile, shapeless=True)
def _gated_gradients(gate: mx.array, opening: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    activated = gate * opening
    return cotangent * up * (opening + activated * (1 - opening)), cotangent * activated


def fake_quantize(x: mx.array, scale: mx.array) -> mx.array:
    """x on the grid of symmetric int8 with step `scale`: round half to even, clamp, multiply back.

    Computed in float32, returned in x's dtype. The gradient passes straight through, also where
    values are clamped; `scale` gets none. Without that, `mx.round` has gradient zero, and neither
    key nor value adapters nor anything below them would train.

    Source: architecture notes, checked against the torch oracle.
    """
    return _on_grid(x, scale)  # type: ignore[return-value, operator]


@mx.custom_function
def _on_grid(x: mx.array, scale: mx.array) -> mx.array:
    steps = mx.clip(mx.round(x.astype(mx.float32) / scale), -128, 127)
    return (steps * scale).astype(x.dtype)


@_on_grid.vjp
def _straight_through(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    return cotangent, mx.zeros_like(primals[1])


@cache
def rotary_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """Angle per position of each pair: theta^(-2i/E), exponent and power in double, then float32.

    The exponent is written as the reference computes it, since at far positions the last bit of a
    frequency shows.
    """
    half = head_dim // 2
    step = (2 / head_dim - 1) / (half - 1)
    return tuple(float(np.float32(theta ** (i * step))) for i in range(half))


def rotary_tables(positions_BL: mx.array, config: AFMConfig, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Cosines and sines as `rotate` takes them, each (B, L, 1, E): angles in float32, then cast to `dtype`.

    Both values of a pair have its cosine; the first has its sine with the sign changed.

    Tables of our own, since queries sit at chosen positions, which `mx.fast.rope` cannot take, and
    since its float32 angles differ from the reference's by 1e-4 at position 4000.
    """
    frequencies = mx.array(rotary_frequencies(config.head_dim, config.rope_theta))
    angles = positions_BL.astype(mx.float32)[..., None, None, None] * frequencies[:, None]
    cos, sin = mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)
    shape = (*positions_BL.shape, 1, config.head_dim)
    return mx.repeat(cos, 2, axis=-1).reshape(shape), mx.concatenate([-sin, sin], axis=-1).reshape(shape)


def rotate(x_BLHE: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turns each interleaved pair (x[2i], x[2i + 1]) by its angle; tables from `rotary_tables`."""
    swapped = x_BLHE.reshape(*x_BLHE.shape[:-1], -1, 2)[..., ::-1].reshape(x_BLHE.shape)
    return x_BLHE * cos + swapped * sin
