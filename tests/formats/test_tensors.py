"""Stored elements and numbers are two things, and no number is read as the other."""

import numpy as np
import pytest

from mlx_afm.formats.tensors import LazyTensor, count_nonfinite

BITS = np.array([0x3F80, 0xC000, 0x8000, 0x7F80, 0xFFC1], np.uint16)


def test_bfloat16_has_bits_and_values():
    tensor = LazyTensor("bfloat16", (5,), lambda: BITS)
    assert tensor.read_stored().dtype == np.uint16
    assert tensor.read_values().dtype == np.float32
    np.testing.assert_array_equal(tensor.read_values(), np.array([1, -2, -0.0, np.inf, np.nan], np.float32))
    assert not hasattr(tensor, "read")
    assert not np.any(LazyTensor("bfloat16", (1,), lambda: BITS[2:3]).read_values()), "minus zero is zero"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint16"])
def test_other_dtypes_are_their_own_values(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    assert LazyTensor.of(array).read_values() is array


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_value_that_is_not_finite_is_counted(dtype):
    limit = np.finfo(dtype).max
    array = np.array([[0, -0.0, limit, -limit], [np.nan, np.inf, -np.inf, np.finfo(dtype).tiny]], dtype)
    assert LazyTensor.of(array).count_nonfinite() == 3
    assert LazyTensor.of(array.T).count_nonfinite() == 3, "not contiguous"
    assert count_nonfinite(array[:1], dtype) == 0
    assert LazyTensor.of(np.zeros((0, 3), dtype)).count_nonfinite() == 0


def test_bfloat16_is_counted_and_integers_are_not():
    assert LazyTensor("bfloat16", (5,), lambda: BITS).count_nonfinite() == 2
    assert LazyTensor.of(BITS).count_nonfinite() == 0
    assert LazyTensor.of(np.array(np.inf, np.float32)).count_nonfinite() == 1, "a scalar"


def test_equal_bits_are_equal_also_if_they_are_no_numbers():
    nan = LazyTensor.of(np.array([np.nan, 1], np.float32))
    assert nan.same_stored(LazyTensor.of(np.array([np.nan, 1], np.float32)))
    assert not nan.same_stored(LazyTensor.of(np.array([np.nan, 2], np.float32)))
    assert not LazyTensor.of(BITS).same_stored(LazyTensor("bfloat16", (5,), lambda: BITS))
