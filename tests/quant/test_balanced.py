import numpy as np
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.quant import dequantize_balanced, pack_codes, quantize_balanced, unpack_codes
from mlx_afm.quant.balanced import fit_scales, rounded
from reference.balanced import best_scale, error_of

DTYPES = ("float32", "bfloat16", "float16")


def on_grid(dtype, scales, seed=0, shape=(12, 64)):
    """Random codes times scales, rounded once to a dtype."""
    codes = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    return codes, rounded((codes.astype(np.float32) - np.float32(1.5)) * scales[:, None], dtype)


def random_scales(kind, per_tensor, dtype, count=12):
    """Scales as the storage dtype has them, or free float32 ones."""
    scales = np.random.default_rng(1).uniform(3e-4, 1, count).astype(np.float32)
    scales = np.repeat(scales[:1], count) if per_tensor else scales
    return rounded(scales, dtype) if kind == "stored" else scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["stored", "free"])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_weights_on_the_grid_come_back_bit_for_bit(dtype, kind, per_tensor):
    codes, weight = on_grid(dtype, random_scales(kind, per_tensor, dtype))
    done = quantize_balanced(weight, dtype=dtype)
    assert done.exact_O.all()
    np.testing.assert_array_equal(done.codes_ON, codes)
    back = dequantize_balanced(unpack_codes(pack_codes(done.codes_ON)), done.scales_O, dtype)
    assert back.tobytes() == weight.tobytes()


def test_the_scale_of_a_stored_row_is_twice_its_least_magnitude():
    scales = random_scales("stored", False, "bfloat16")
    np.testing.assert_array_equal(quantize_balanced(on_grid("bfloat16", scales)[1], dtype="bfloat16").scales_O, scales)


def test_a_row_of_one_magnitude_and_a_row_of_zeros_are_exact():
    weight = np.array([[3, -3] * 8, [0, -0.0] * 8, [1.5, -0.5] * 8], np.float32)
    done = quantize_balanced(weight)
    assert done.exact_O.all()
    np.testing.assert_array_equal(done.scales_O, np.array([6, 0, 1], np.float32))
    assert dequantize_balanced(done.codes_ON, done.scales_O).tobytes() == weight.tobytes()


def test_a_row_off_the_grid_by_one_bit_is_seen():
    _, weight = on_grid("float32", random_scales("stored", False, "float32"))
    weight[3, 63] = np.nextafter(weight[3, 63], np.float32(9))
    done = quantize_balanced(weight)
    assert done.exact_O.tolist() == [row != 3 for row in range(12)]


def test_other_rows_get_the_scale_of_least_squared_error():
    rng = np.random.default_rng(2)
    weight = np.concatenate([rng.standard_normal((6, 32)), rng.standard_cauchy((6, 32))]).astype(np.float32)
    done = quantize_balanced(weight)
    assert not done.exact_O.any()
    for row, scale, back in zip(weight, done.scales_O, dequantize_balanced(done.codes_ON, done.scales_O)):
        _, least = best_scale(row)
        assert error_of(row, scale) <= least * (1 + 1e-6)
        assert np.sum((row.astype(np.float64) - back) ** 2) <= least * (1 + 1e-6)


def test_column_weights_move_the_scale_to_where_it_counts():
    rng = np.random.default_rng(3)
    weight, counts = rng.standard_normal((6, 48)).astype(np.float32), rng.uniform(0, 1, 48) ** 8
    counts[:5] = 0
    scales = fit_scales(weight, counts)
    for row, scale in zip(weight, scales):
        assert error_of(row, scale, counts) <= best_scale(row, counts)[1] * (1 + 1e-6)
    assert not np.allclose(scales, fit_scales(weight))


def test_one_scale_for_a_tensor():
    weight = np.random.default_rng(4).standard_normal((4, 16)).astype(np.float32)
    scales = fit_scales(weight, per_tensor=True)
    assert len(set(scales.tolist())) == 1
    assert error_of(weight.reshape(-1), scales[0]) <= best_scale(weight.reshape(-1))[1] * (1 + 1e-6)


def test_codes_are_packed_as_mlx_packs_them():
    codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 4
    words = pack_codes(codes)
    assert words.tolist() == [[sum(int(code) << 2 * place for place, code in enumerate(codes[0, :16]))] * 2]
    np.testing.assert_array_equal(unpack_codes(words), codes)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"column_weights_N": np.ones(15)}, "column weights that cannot be used"),
        ({"column_weights_N": -np.ones(16)}, "column weights that cannot be used"),
        ({"column_weights_N": np.zeros(16)}, "all zero"),
    ],
)
def test_column_weights_that_mean_nothing_are_refused(arguments, what):
    with pytest.raises(ConfigError, match=what):
        quantize_balanced(np.random.default_rng(5).standard_normal((2, 16)).astype(np.float32), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ConfigError, match="not finite"):
        quantize_balanced(np.array([[bad] + [1.0] * 15], np.float32))


def test_odd_widths_cannot_be_packed():
    with pytest.raises(ConfigError, match="multiple of 16"):
        pack_codes(np.zeros((1, 17), np.uint8))
