"""The CPU's attention and exponentials against MLX's own, and against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_afm.model import backend
from mlx_afm.model.backend import exp, sigmoid
from mlx_afm.model.cpu import attention as attention_cpu
from mlx_afm.model.cpu.attention import attention_on_cpu
from mlx_afm.model.layers import kept_silu, swiglu

SCALE = 0.25


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), mx.float32)


def inputs(groups=3, heads=6, key_heads=2, queries=5, keys=7, width=16):
    return (
        random(groups, heads, queries, width),
        random(groups, key_heads, keys, width, seed=1),
        random(groups, key_heads, keys, width, seed=2),
    )


MASKS = {
    "all": None,
    "causal": "causal",
    "each group its own": random(3, 1, 5, 7, seed=3) > 0,
    "one for all": mx.tril(mx.ones((5, 7), dtype=mx.bool_), k=2),
}


def by_mlx(mask):
    return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask)


def ours(mask):
    return lambda q, k, v: attention_on_cpu(q, k, v, scale=SCALE, mask=mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_output_and_gradients_are_those_of_mlx(mask):
    primals, cotangent = inputs(), random(3, 6, 5, 16, seed=4)
    (expected,), gradients = mx.vjp(by_mlx(mask), primals, [cotangent])
    (out,), own_gradients = mx.vjp(ours(mask), primals, [cotangent])
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-6)
    for own, other in zip(own_gradients, gradients, strict=True):
        np.testing.assert_allclose(np.array(own), np.array(other), atol=5e-6)


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 7])
def test_causal_queries_in_blocks_are_the_same(queries, monkeypatch):
    primals, cotangent = inputs(queries=queries), random(3, 6, queries, 16, seed=4)
    (expected,), gradients = mx.vjp(by_mlx("causal"), primals, [cotangent])
    monkeypatch.setattr(attention_cpu, "CAUSAL_QUERIES", 2)
    (out,), own_gradients = mx.vjp(ours("causal"), primals, [cotangent])
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-6)
    for own, other in zip(own_gradients, gradients, strict=True):
        np.testing.assert_allclose(np.array(own), np.array(other), atol=5e-6)


def test_a_query_that_sees_nothing_gives_and_gets_nothing():
    """MLX gives it the mean of all values; the others are as without it."""
    primals, cotangent, seen = inputs(), random(3, 6, 5, 16, seed=4), mx.array([0, 1, 3, 4])
    mask = (mx.arange(5)[:, None] != 2) & (mx.arange(7) < 4)
    (out,), gradients = mx.vjp(ours(mask), primals, [cotangent])
    assert not out[:, :, 2].any()
    assert not gradients[0][:, :, 2].any()
    rest = [primals[0][:, :, seen], *primals[1:]]
    (expected,), others = mx.vjp(by_mlx(mask[seen]), rest, [cotangent[:, :, seen]])
    for own, other in zip(
        [out[:, :, seen], gradients[0][:, :, seen], *gradients[1:]], [expected, *others], strict=True
    ):
        np.testing.assert_allclose(np.array(own), np.array(other), atol=5e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_sixteen_bits_are_rounded_once(dtype):
    narrow = [array.astype(dtype) for array in inputs()]
    out = ours("causal")(*narrow)
    exact = ours("causal")(*(array.astype(mx.float32) for array in narrow))
    assert out.dtype == dtype
    assert mx.array_equal(out, exact.astype(dtype))


def test_far_apart_scores_overflow_nowhere():
    q, k, v = inputs()
    out = ours(None)(q * 1e4, k, v)
    assert mx.isfinite(out).all()
    np.testing.assert_allclose(np.array(out), np.array(by_mlx(None)(q * 1e4, k, v)), atol=1e-5)


def test_exponentials_are_right_to_the_last_bits():
    x = np.linspace(-80, 80, 4001).astype(np.float32)
    wide = x.astype(np.float64)
    # x log2 e is rounded once, which moves e^x by up to |x| half units of the last place.
    assert (np.abs(np.array(exp(mx.array(x))) / np.exp(wide) - 1) < 2e-7 * (1 + np.abs(wide))).all()
    assert np.abs(np.array(sigmoid(mx.array(x))) - 1 / (1 + np.exp(-wide))).max() < 2e-7
    assert np.array_equal(np.array(sigmoid(mx.array([-1e4, 1e4, -np.inf, np.inf]))), [0, 1, 0, 1])


@pytest.mark.parametrize("function", [swiglu, lambda gate, up: kept_silu(gate) * up])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_swiglu_and_its_gradient(on_cpu, function, monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: on_cpu)
    primals, cotangent = [random(4, 9), random(4, 9, seed=1)], random(4, 9, seed=2)
    (expected,), gradients = mx.vjp(lambda gate, up: nn.silu(gate) * up, primals, [cotangent])
    (out,), own_gradients = mx.vjp(function, primals, [cotangent])
    for own, other in zip([out, *own_gradients], [expected, *gradients], strict=True):
        np.testing.assert_allclose(np.array(own), np.array(other), atol=1e-6)
