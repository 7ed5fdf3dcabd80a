"""Building blocks that are the same in both kinds of layers.

Shape suffixes: B batch, L tokens, H heads, E head width, P pairs of it, D model width.
"""

from __future__ import annotations

from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_afm.model import backend
from mlx_afm.model.config import AFMConfig
from mlx_afm.model.projections import Linear
from mlx_afm.model.recompute import recomputed


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype; the mean is taken in float32.

    One kernel. In 16 bits it rounds the normalized value before it multiplies by the weight, as every MLX model does
    (docs/decisions/0008).
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """The normalized x, in x's dtype."""
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class FeedForward(nn.Module):
    """down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_dim, config.feed_forward_dim)
        self.up_proj = Linear(config.hidden_dim, config.feed_forward_dim)
        self.down_proj = Linear(config.feed_forward_dim, config.hidden_dim)

    def __call__(self, x: mx.array, norm: RMSNorm) -> mx.array:
        """x + the feed-forward of x after `norm`, (..., D) to (..., D).

        Cost: in training, of the values between, those of the gate and up projections alone are kept for the backward
        pass, and on the CPU, where sigmoids are slow, the derivatives of the activation.
        """
        if not self.training:
            return self.down_proj.plus(silu_times(*self.gate_and_up(norm(x))), x)
        gate, up = recomputed([norm, self.gate_proj, self.up_proj], lambda x: self.gate_and_up(norm(x)), x)
        if backend.on_cpu():
            gate = kept_silu(gate)
        act = _times if backend.on_cpu() else swiglu
        return recomputed([self.down_proj], lambda gate, up, x: self.down_proj.plus(act(gate, up), x), gate, up, x)

    def gate_and_up(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Both projections of x, each (..., F); one product where the inference form has joined them."""
        if "gate_up_proj" in self:
            return self.gate_up_proj(x)
        return self.gate_proj(x), self.up_proj(x)


def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up for inference: one kernel, and no gradient on the CPU."""
    if not backend.on_cpu():
        return _silu_times(gate, up)
    wide = gate.astype(mx.float32)
    return _gate_times_up(wide, backend.sigmoid(wide), up).astype(up.dtype)


@backend.one_kernel
def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up).astype(up.dtype)


def _times(silu: mx.array, up: mx.array) -> mx.array:
    return silu * up


def kept_silu(gate: mx.array) -> mx.array:
    """silu(gate). Its derivatives are computed at once, and kept for the gradient in the place of the gate."""
    outputs: tuple[mx.array, mx.array] = _silu_and_derivative(gate)  # type: ignore
    return outputs[0]


@mx.custom_function
def _silu_and_derivative(gate: mx.array) -> tuple[mx.array, mx.array]:
    return _times_with_derivative(gate, backend.sigmoid(gate))


@_silu_and_derivative.vjp
def _by_derivative(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
    return cotangents[0] * outputs[1]


@partial(mx.compile, shapeless=True)  # one pass over arrays of the feed-forward's width
def _times_with_derivative(gate: mx.array, sigmoid: mx.array) -> tuple[mx.array, mx.array]:
    activated = gate * sigmoid
    return activated, sigmoid + activated * (1 - sigmoid)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. The sigmoid is computed once and serves the gradient too."""
    return _gated(gate, mx.stop_gradient(backend.sigmoid(gate)), up)  # type: ignore[return-value, operator]


@mx.custom_function
def _gated(gate: mx.array, sigmoid: mx.array, up: mx.array) -> mx.array:
    return _gate_times_up(gate, sigmoid, up)


@_gated.vjp
def _gate_and_up(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of `gate` goes by the sigmoid as well; the sigmoid as an argument therefore gets none."""
    gate, sigmoid, up = primals
    gate_gradient, up_gradient = _gated_gradients(gate, sigmoid, up, cotangent)
    return gate_gradient, mx.zeros_like(sigmoid), up_gradient


@partial(mx.compile, shapeless=True)
def _gate_times_up(gate: mx.array, sigmoid: mx.array, up: mx.array) -> mx.array:
    return gate * sigmoid * up


@partial(mx.compile, shapeless=True)
def _gated_gradients(gate: mx.array, sigmoid: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    activated = gate * sigmoid
    return cotangent * up * (sigmoid + activated * (1 - sigmoid)), cotangent * activated


def fake_quantize(x: mx.array, scale: mx.array, *, training: bool = True) -> mx.array:
    """x on the grid of symmetric int8 with step `scale`: round half to even, clamp, multiply back.

    Computed in float32, returned in x's dtype; one kernel.

    Args:
        training: pass the gradient straight through, also where values are clamped; `scale` gets none. Without that,
            `mx.round` has gradient zero, and neither key nor value adapters nor anything below them would train.

    Source: architecture notes, checked against the torch oracle.
    """
    if not training:
        return _on_grid(x, scale)
    return _straight_through(x, scale)  # type: ignore[return-value, operator]


@backend.one_kernel
def _on_grid(x: mx.array, scale: mx.array) -> mx.array:
    steps = mx.clip(mx.round(x.astype(mx.float32) / scale), -128, 127)
    return (steps * scale).astype(x.dtype)


@mx.custom_function
def _straight_through(x: mx.array, scale: mx.array) -> mx.array:
    return _on_grid(x, scale)


@_straight_through.vjp
def _same_gradient(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
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
    """Cosines and sines as `rotate` takes them, each (B, L, 1, P, 2): angles in float32, then cast to `dtype`.

    Both values of a pair have its cosine; the first has its sine with the sign changed.

    Tables of our own, since queries sit at chosen positions, which `mx.fast.rope` cannot take, and
    since its float32 angles differ from the reference's by 1e-4 at position 4000.
    """
    frequencies = mx.array(rotary_frequencies(config.head_dim, config.rope_theta))
    angles = positions_BL.astype(mx.float32)[..., None, None, None] * frequencies[:, None]
    cos, sin = mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)
    return mx.repeat(cos, 2, axis=-1), mx.concatenate([-sin, sin], axis=-1)


def rotate(x_BLHP2: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turns each interleaved pair of values by its angle; tables from `rotary_tables`."""
    return _turned(x_BLHP2, x_BLHP2[..., ::-1], cos, sin)  # in this shape the exchanged pairs are a view


def rotate_in_training(x_BLHP2: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The same; its gradient is turned back in as few operations."""
    turn = mx.custom_function(lambda x: rotate(x, cos, sin))
    turn.vjp(lambda _, cotangent, __: cotangent * cos - cotangent[..., ::-1] * sin)
    return turn(x_BLHP2)  # type: ignore[return-value, operator]


@backend.one_kernel
def _turned(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x * cos + swapped * sin).astype(x.dtype)
