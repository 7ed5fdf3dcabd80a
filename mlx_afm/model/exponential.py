"""Exponentials, and what is made of them, by the way that is quick on the device.

MLX's CPU backend computes `exp`, and with it `sigmoid` and `softmax`, at about 20 ns a value on x86 (MLX 0.32), and
`power` at 6: in a training step of 18 layers the exponentials took a quarter of the time. So there e^x is
2^(x log2 e). The two agree to a few units in the last place; float32 in any case. A GPU takes MLX's own.
"""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)


def on_cpu() -> bool:
    """Whether new arrays are computed by the CPU backend."""
    return bool(mx.default_device() == mx.cpu)


def exp(x: mx.array) -> mx.array:
    """e^x of a float32 array. Its gradient is not meant to be taken: where one is needed, it is written out."""
    return mx.power(2.0, x * LOG2_E) if on_cpu() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), in x's dtype, without a gradient."""
    if not on_cpu():
        return mx.sigmoid(x)
    return (1 / (1 + mx.power(2.0, x.astype(mx.float32) * -LOG2_E))).astype(x.dtype)
