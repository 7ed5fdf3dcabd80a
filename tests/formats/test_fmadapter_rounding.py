"""What becoming float16 costs, against plain arithmetic."""

import numpy as np
import pytest

from mlx_afm.formats.fmadapter_plan import PIECE, Rounding


def test_errors_are_those_of_plain_arithmetic():
    rng, rounding = np.random.default_rng(0), Rounding()
    tensors = {
        "one": rng.standard_normal((PIECE // 64, 70)).astype(np.float32),
        "two": (30 * rng.standard_normal((7, 5))).astype(np.float32).T,
        "three": np.array([[1e-9, -1e-9, 0, 1]], np.float32),
    }
    for name, values in tensors.items():
        rounding.add(name, values, values.astype(np.float16))
    errors = {name: np.abs(values - values.astype(np.float16).astype(np.float64)) for name, values in tensors.items()}
    every = np.concatenate([error.ravel() for error in errors.values()])
    assert rounding.values == every.size
    assert rounding.max_error == pytest.approx(every.max(), rel=1e-6)
    assert rounding.worst_tensor == max(errors, key=lambda name: errors[name].max()) == "two"
    assert rounding.mean_error == pytest.approx(every.mean(), rel=1e-5)
    assert rounding.vanished == 2
    assert rounding.to_dict()["mean_error"] == rounding.mean_error


def test_nothing_is_lost_of_float16_or_of_nothing():
    rounding = Rounding()
    assert rounding.mean_error == 0
    values = np.ones((3, 4), np.float16)
    rounding.add("a", values, values)
    assert (rounding.values, rounding.max_error, rounding.worst_tensor, rounding.vanished) == (12, 0, "", 0)
