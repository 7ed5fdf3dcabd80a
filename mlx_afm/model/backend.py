"""Operations whose best form depends on the device.

A GPU takes MLX's own operations, and few of them: each is a kernel to launch. What only MLX's CPU backend needs lies in
`cpu/`. `on_cpu` is the one question that decides, and `counting as on a GPU` (benchmarks/bench_graph.py) replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import mlx.core as mx

from mlx_afm.model.cpu import exponential
from mlx_afm.model.cpu.attention import MIN_QUERIES, attention_on_cpu


def on_cpu() -> bool:
    """Whether new arrays are computed by the CPU backend."""
    return bool(mx.default_device() == mx.cpu)


@contextmanager
def wired_weights() -> Iterator[None]:
    """Keeps MLX's arrays from being paged out meanwhile, as far as macOS recommends; elsewhere nothing is done.

    Source: `mx.set_wired_limit`; mlx-lm generates in the same way.
    """
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


def one_kernel(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An elementwise function as one kernel on a GPU.

    The CPU backend would call a compiler for it, which takes longer than most answers, and runs it as it is.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        return function(*arrays) if on_cpu() else compiled(*arrays)

    return run


def attention(
    q_GHNE: mx.array, k_GKSE: mx.array, v_GKSE: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """softmax(q k^T * scale) v, (G, H, N, E), with the softmax in float32.

    Args:
        mask: bool, broadcast to (G, 1, N, S); "causal", the last query standing at the last key; None for all.
    """
    if on_cpu() and q_GHNE.shape[2] >= MIN_QUERIES:
        return attention_on_cpu(q_GHNE, k_GKSE, v_GKSE, scale=scale, mask=mask)
    return mx.fast.scaled_dot_product_attention(q_GHNE, k_GKSE, v_GKSE, scale=scale, mask=mask)


def scaled_product(a: mx.array, b: mx.array, scale: float, *, like: mx.array) -> mx.array:
    """scale * (a @ b), in one kernel on a GPU; the CPU backend would copy `like` first. Do not differentiate it.

    Args:
        like: any array of the result's shape and dtype.
    """
    if on_cpu():
        return scale * (a @ b)
    return mx.addmm(like, a, b, alpha=scale, beta=0.0)


def exp(x: mx.array) -> mx.array:
    """e^x of a float32 array. Do not differentiate it: callers write their gradients out."""
    return exponential.exp(x) if on_cpu() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), in x's dtype. Do not differentiate it: callers write their gradients out."""
    return exponential.sigmoid(x) if on_cpu() else mx.sigmoid(x)
