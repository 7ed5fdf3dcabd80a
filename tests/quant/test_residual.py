"""Codes and low-rank part of a matrix, against full singular value decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.quant import dequantize_balanced, quantize_balanced
from mlx_afm.quant import residual as module
from mlx_afm.quant.residual import InitConfig, directions, split


def matrix(rows=40, columns=64, seed=0):
    """With singular values that fall, as trained weights have them."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    values = 3 / (1 + np.arange(rows))
    return ((left * values) @ right[:rows]).astype(np.float32)


def rounding(weight):
    made = quantize_balanced(weight)
    return dequantize_balanced(made.codes_ON, made.scales_O)


def best_rank(weight, rank):
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (64, 64)])
def test_directions_are_the_best_of_their_rank(rank, shape):
    weight = matrix(*shape) if shape[0] <= shape[1] else matrix(*reversed(shape)).T
    a, b = directions(weight, rank)
    assert (a.shape, b.shape, a.dtype) == ((shape[1], rank), (rank, shape[0]), np.float32)
    np.testing.assert_allclose((a @ b).T, best_rank(weight, rank), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-3)


def test_a_rank_above_the_matrix_leaves_zeros():
    weight = matrix(8, 64)
    a, b = directions(weight, 12)
    assert not a[:, 8:].any()
    assert not b[8:].any()
    np.testing.assert_allclose((a @ b).T, weight, atol=2e-5)


def test_with_column_weights_they_are_the_best_for_the_outputs():
    weight, rng = matrix(), np.random.default_rng(1)
    columns = rng.uniform(0.01, 5, 64).astype(np.float32)

    def error(low_rank):
        return float(np.square((weight - low_rank) * columns).sum())

    a, b = directions(weight, 6, columns)
    wanted = best_rank(weight * columns, 6) / columns
    np.testing.assert_allclose((a @ b).T, wanted, atol=1e-4)
    assert error((a @ b).T) < 0.98 * error(best_rank(weight, 6))


def test_large_matrices_go_by_projection_and_lose_next_to_nothing(monkeypatch):
    monkeypatch.setattr(module, "EXACT_SIDE", 60)
    weight = matrix(150, 200)
    a, b = directions(weight, 8)
    again = directions(weight, 8)
    assert np.array_equal(a, again[0])
    assert np.array_equal(b, again[1])
    exact = np.linalg.norm(weight - best_rank(weight, 8))
    assert exact <= np.linalg.norm(weight - (a @ b).T) < 1.001 * exact


@pytest.mark.parametrize("init", ["residual-svd", "weight-svd"])
def test_the_parts_add_up_with_the_error_that_is_told(init):
    weight = matrix()
    made = split(weight, rounding, InitConfig(init=init, rank=8))
    codes = rounding(made.rounded_from(weight))
    before, after = (np.square(array).sum() / np.square(weight).sum() for array in
                     (weight - rounding(weight), weight - codes - (made.a_NR @ made.b_RO).T))  # fmt: skip
    assert made.error_after == pytest.approx(after, rel=1e-3)
    assert made.error_before == pytest.approx(before, rel=1e-4)
    assert made.error_after < 0.8 * made.error_before
    assert (made.taken_a_NR is None) == (init == "residual-svd")
    if init == "residual-svd":
        np.testing.assert_allclose((made.a_NR @ made.b_RO).T, best_rank(weight - codes, 8), atol=2e-5)


@pytest.mark.parametrize("init", ["residual-svd", "weight-svd"])
def test_more_rounds_are_never_worse(init):
    weight = matrix(seed=3)
    errors = [split(weight, rounding, InitConfig(init=init, rank=8, rounds=n)).error_after for n in (1, 2, 5)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < errors[0]


def test_column_weights_of_one_are_none_at_all():
    weight = matrix()
    plain = split(weight, rounding, InitConfig(rank=4))
    weighted = split(weight, rounding, InitConfig(rank=4), np.full(64, 7.0))
    assert weighted.error_after == pytest.approx(plain.error_after, rel=1e-5)
    np.testing.assert_allclose(weighted.a_NR @ weighted.b_RO, plain.a_NR @ plain.b_RO, atol=1e-5)


def test_an_input_that_is_always_zero_does_not_divide_by_zero():
    columns = np.ones(64)
    columns[3] = 0
    made = split(matrix(), rounding, InitConfig(rank=4), columns)
    assert np.isfinite(made.a_NR).all()
    assert np.isfinite(made.b_RO).all()


@pytest.mark.parametrize("columns", [np.zeros(64), np.full(64, -1.0), np.ones(63), np.full(64, np.nan)])
def test_column_weights_that_cannot_be_used(columns):
    with pytest.raises(ConfigError, match="64 finite numbers from 0 on"):
        split(matrix(), rounding, InitConfig(), columns)


def test_settings_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as caught:
        InitConfig(init="svd", rank=0, rounds=True, scale=0)
    for text in ("init: expected residual-svd or weight-svd, found svd", "rank: ", "rounds: ", "scale: "):
        assert text in str(caught.value)
