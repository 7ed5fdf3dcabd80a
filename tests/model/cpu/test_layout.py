"""Matrices by columns: other places in memory, nothing else."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm.model.cpu.layout as layout_module
from mlx_afm.model import backend
from mlx_afm.model.cpu.layout import lay_out_for_decoding
from mlx_afm.model.projections import FusedLinear, Linear
from tiny import tiny_model, with_adapter

pytestmark = pytest.mark.skipif(not backend.on_cpu(), reason="a layout of the CPU backend alone")


def matrices(model):
    return [module.weight for module in model.modules() if isinstance(module, (Linear, FusedLinear))]


def lies_by_columns(matrix):
    array = np.array(matrix, copy=False)
    return array.strides == (array.itemsize, array.itemsize * array.shape[0])


def test_values_stay_and_places_change():
    model = with_adapter(tiny_model())
    before = [np.array(matrix) for matrix in matrices(model)]
    lay_out_for_decoding(model)
    assert before
    assert all(map(lies_by_columns, matrices(model)))
    assert all(np.array_equal(old, np.array(new)) for old, new in zip(before, matrices(model)))


def test_what_lies_so_is_left():
    model = tiny_model()
    lay_out_for_decoding(model)
    first = matrices(model)
    lay_out_for_decoding(model)
    assert all(new is old for new, old in zip(matrices(model), first))


def test_rows_that_are_no_multiple_of_a_step():
    layer = Linear(5, 2 * layout_module._ROWS + 3)
    x = mx.random.normal((3, 5))
    before, expected = np.array(layer.weight), layer(x)
    lay_out_for_decoding(layer)
    assert np.array_equal(np.array(layer.weight), before)
    assert mx.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_matrices_of_one_row_or_column(shape):
    layer = Linear(*shape[::-1])
    before = np.array(layer.weight)
    lay_out_for_decoding(layer)
    assert np.array_equal(np.array(layer.weight), before)


def test_16_bits_and_codes_are_left():
    half, coded = Linear(64, 64), Linear(64, 64).to_quantized(bits=4)
    half.weight = half.weight.astype(mx.bfloat16)
    weights = half.weight, coded.weight
    for layer in (half, coded):
        lay_out_for_decoding(layer)
    assert half.weight is weights[0]
    assert coded.weight is weights[1]


def test_a_gpu_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    model = tiny_model()
    before = matrices(model)
    lay_out_for_decoding(model)
    assert all(new is old for new, old in zip(matrices(model), before))
