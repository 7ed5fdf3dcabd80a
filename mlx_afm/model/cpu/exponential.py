"""Exponentials by powers of two.

MLX's CPU backend computes `exp`, and with it `sigmoid` and `softmax`, at about 20 ns a value on x86 (MLX 0.32), and
`power` at 6: in a training step of 18 layers the exponentials took a quarter of the time. So e^x is 2^(x log2 e) here.
The two agree to a few units in the last place.
"""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)


def exp(x: mx.array) -> mx.array:
    """e^x of a float32 array."""
    return mx.power(2.0, x * LOG2_E)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), computed in float32, in x's dtype."""
    return (1 / (1 + mx.power(2.0, x.astype(mx.float32) * -LOG2_E))).astype(x.dtype)
