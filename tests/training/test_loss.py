"""The chunked loss: equal to a float64 loop, its gradient to the plain one's, in little memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.training.loss import chunked_cross_entropy, cross_entropy, summed_loss

TOKENS, WIDTH, VOCABULARY = 23, 8, 37


def problem():
    rng = np.random.default_rng(0)
    hidden = mx.array(rng.standard_normal((TOKENS, WIDTH)), mx.float32)
    table = mx.array(rng.standard_normal((VOCABULARY, WIDTH)), mx.float32)
    targets = mx.array(rng.integers(0, VOCABULARY, TOKENS), mx.int32)
    weights = mx.array(rng.choice([0.0, 1.0, 0.5], TOKENS), mx.float32)
    return hidden, table, targets, weights


def loop(hidden, table, targets, weights) -> float:
    total = 0.0
    for row, target, weight in zip(np.array(hidden, np.float64), targets.tolist(), weights.tolist()):
        scores = np.array(table, np.float64) @ row
        total += weight * (np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
    return total


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
def test_value_and_gradient(chunk_tokens):
    hidden, table, targets, weights = problem()

    def chunked(hidden):
        return 3 * chunked_cross_entropy(hidden, lambda h: h @ table.T, targets, weights, chunk_tokens=chunk_tokens)

    def plain(hidden):
        return 3 * cross_entropy(hidden @ table.T, targets, weights)

    loss, gradient = mx.value_and_grad(chunked)(hidden)
    expected, expected_gradient = mx.value_and_grad(plain)(hidden)
    assert loss.item() == pytest.approx(3 * loop(hidden, table, targets, weights), rel=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.abs(gradient - expected_gradient).max().item() < 1e-5
    summed = summed_loss(hidden, lambda h: h @ table.T, targets, weights, chunk_tokens=chunk_tokens)
    assert summed.item() == pytest.approx(loss.item() / 3, rel=1e-6)


def test_gradient_flows_further_down_and_weights_of_zero_teach_nothing():
    hidden, table, targets, weights = problem()
    matrix = mx.eye(WIDTH)

    def loss(matrix):
        return chunked_cross_entropy(hidden @ matrix, lambda h: h @ table.T, targets, weights, chunk_tokens=4)

    def plain(matrix):
        return cross_entropy(hidden @ matrix @ table.T, targets, weights)

    assert mx.abs(mx.grad(loss)(matrix) - mx.grad(plain)(matrix)).max().item() < 1e-4
    nothing = mx.grad(lambda h: chunked_cross_entropy(h, lambda x: x @ table.T, targets, mx.zeros(TOKENS)))(hidden)
    assert not mx.any(nothing).item()


def test_sixteen_bit_hidden_states_are_summed_in_float32():
    hidden, table, targets, weights = problem()
    half = hidden.astype(mx.bfloat16)
    loss, gradient = mx.value_and_grad(
        lambda h: chunked_cross_entropy(h, lambda x: x @ table.astype(mx.bfloat16).T, targets, weights)
    )(half)
    assert (loss.dtype, gradient.dtype) == (mx.float32, mx.bfloat16)


def test_chunks_come_one_after_the_other():
    """Peak memory is that of the operations in flight (ten on the CPU), far under all logits."""
    tokens, vocabulary = 2048, 8192
    hidden = mx.random.normal((tokens, 16))
    table = mx.random.normal((vocabulary, 16))
    targets, weights = mx.zeros((tokens,), mx.int32), mx.ones((tokens,))
    mx.eval(hidden, table, targets, weights)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradient = mx.grad(lambda h: chunked_cross_entropy(h, lambda x: x @ table.T, targets, weights, chunk_tokens=32))
    mx.eval(gradient(hidden))
    peak = mx.get_peak_memory() - before
    chunk_bytes, all_bytes = 32 * vocabulary * 4, tokens * vocabulary * 4
    assert peak < 12 * chunk_bytes < all_bytes / 4


def test_chunk_size_is_checked():
    hidden, table, targets, weights = problem()
    with pytest.raises(ConfigError, match="chunk_tokens below 1"):
        chunked_cross_entropy(hidden, lambda h: h @ table.T, targets, weights, chunk_tokens=0)
