"""The update of a low-rank adapter and its gradients: one value, as the CPU and as a GPU computes them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.model import backend
from mlx_afm.model.lora import add_scaled_product


@pytest.mark.parametrize("on_cpu", [True, False])
def test_gradients_of_a_low_rank_update(on_cpu, monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: on_cpu)
    rng, scale = np.random.default_rng(0), 0.7
    y, inner, b, cotangent = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 6), (2, 5, 3), (3, 6), (2, 5, 6))
    )
    given = [mx.array(array) for array in (y, inner, b)]
    (out,), gradients = mx.vjp(lambda y, i, b: add_scaled_product(y, i, b, scale), given, [mx.array(cotangent)])
    np.testing.assert_allclose(out, y + scale * inner @ b, atol=1e-5)
    np.testing.assert_allclose(gradients[0], cotangent, atol=0)
    np.testing.assert_allclose(gradients[1], scale * cotangent @ b.T, atol=1e-5)
    flat = inner.reshape(-1, 3).T @ cotangent.reshape(-1, 6)
    np.testing.assert_allclose(gradients[2], scale * flat, atol=1e-5)
