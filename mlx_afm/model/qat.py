"""Projections that learn to be quantized: quantization-aware training of balanced 2-bit weights.

Forward, a weight is the nearest of {-1.5, -0.5, 0.5, 1.5} * s, with a scale s per row. Backward, the gradient
passes straight through to every weight within 2 s, where the cell of the outermost level ends; beyond it a
weight gets none. With v = w / s and its level q the scale's gradient is that of `s * round(clip(v))`: the sum
over the row of g * (q - v) within the range and g * q beyond it, divided by sqrt(1.5 N), so that it
weighs about as much as a weight's whatever the width.

Arrays: `weight` (O, N) and `scales` (O,), float32, both trained. Which codes they mean is decided in one
place, `levels`, so what is exported is what was trained.

Source: straight-through estimator, arXiv 1308.3432; learned steps, arXiv 1902.08153, section 2; checked against a
float64 loop. Shape suffixes: O rows (outputs), N columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_afm.errors import ConfigError
from mlx_afm.model.model import Model
from mlx_afm.model.packed import Packed
from mlx_afm.model.projections import FusedLinear, Linear, pack, quantized
from mlx_afm.quant import QuantConfig, Scheme, plan_schemes, quantize_balanced
from mlx_afm.quant.recipes import EMBEDDING

RECIPE = QuantConfig(recipe="apple")  # what a trained folder is: balanced projections, 4-bit embedding
RANGE, LARGEST = 2.0, 1.5  # in scales
SMALLEST = 1e-30  # scale


def levels(weight_ON: mx.array, scales_O: mx.array) -> mx.array:
    """The nearest of -1.5, -0.5, 0.5 and 1.5 to each weight in its row's scale; float32."""
    large = mx.abs(weight_ON) > usable(scales_O)[:, None]
    return mx.where(large, LARGEST, 0.5) * mx.where(weight_ON < 0, -1.0, 1.0)


def usable(scales_O: mx.array) -> mx.array:
    """The scales, above zero: one that training pushed below comes back by its gradient."""
    return mx.maximum(scales_O, SMALLEST)


@mx.custom_function
def on_grid(weight_ON: mx.array, scales_O: mx.array) -> mx.array:
    """The weights as their codes have them, float32; the module says what its gradients are."""
    return levels(weight_ON, scales_O) * usable(scales_O)[:, None]


@on_grid.vjp
def _straight_through(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    weight, scales = primals
    steps, level = weight / usable(scales)[:, None], levels(weight, scales)
    inside = mx.abs(steps) <= RANGE
    by_scale = mx.sum(cotangent * mx.where(inside, level - steps, level), axis=1)
    return mx.where(inside, cotangent, 0.0), by_scale / math.sqrt(LARGEST * weight.shape[1])


class QATLinear(nn.Module):
    """A linear layer whose weight is trained while its codes are used."""

    def __init__(self, weight: mx.array, scales: mx.array) -> None:
        super().__init__()
        self.weight, self.scales = weight, scales

    def __call__(self, x: mx.array) -> mx.array:
        """The projection of x (..., N) by the weights on the grid."""
        weight: mx.array = on_grid(self.weight, self.scales)  # type: ignore
        return x @ weight.astype(x.dtype).T

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the projection of x."""
        return residual + self(x)


class QATFusedLinear(nn.Module):
    """The same of the projection to queries, keys and values; see `projections.FusedLinear`."""

    def __init__(self, weight: mx.array, scales: mx.array, q_dims: int, kv_dims: int) -> None:
        super().__init__()
        self.weight, self.scales = weight, scales
        self.q_dims, self.kv_dims = q_dims, kv_dims

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        weight: mx.array = on_grid(self.weight, self.scales)  # type: ignore
        rows = mx.split(weight.astype(x.dtype), [self.q_dims, self.q_dims + self.kv_dims])
        q, k, v = ((y @ row.T) for y, row in zip((x if x_queries is None else x_queries, x, x), rows))
        return q, k, v


def start_qat(model: Model, paths: Iterable[str]) -> None:
    """Makes some projections trainable as quantized weights; all else is frozen, in float32, the embedding in 4 bits.

    Args:
        model: dense; changed in place. Its codes are then those that `convert -q --q-recipe apple` makes of
            the same projections: a scale starts where the squared error is least.
        paths: of projections.

    Raises:
        ConfigError: widths that codes do not fill.
    """
    schemes = _schemes(model, paths)
    started = [(path, _started(module)) for path, module in _modules(model, schemes)]
    model.freeze()
    _quantize_embedding(model, schemes, mx.float32)
    model.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    model.update_modules(tree_unflatten(started))


def put_codes(model: Model, weights: Mapping[str, mx.array]) -> None:
    """Puts what was trained into a dense model, quantized; the embedding takes 4 bits.

    Args:
        model: dense; changed in place. Everything else keeps its dtype.
        weights: `PATH.weight` (O, N) and `PATH.scales` (O,), as `start_qat` made them trainable.
    """
    schemes = _schemes(model, [name.removesuffix(".scales") for name in weights if name.endswith(".scales")])
    dtype = model.model.output_norm.weight.dtype
    made = []
    for path, module in _modules(model, schemes):
        packed = in_codes(weights[f"{path}.weight"], weights[f"{path}.scales"], schemes[path])
        made.append((path, quantized(module, packed, dtype)))
    _quantize_embedding(model, schemes, dtype)
    model.update_modules(tree_unflatten(made))


def in_codes(weight_ON: mx.array, scales_O: mx.array, scheme: Scheme) -> Packed:
    """The codes that training used."""
    codes = (levels(weight_ON, scales_O) + LARGEST).astype(mx.uint32).reshape(len(weight_ON), -1, 16)
    words = (codes << mx.arange(0, 32, 2, dtype=mx.uint32)).sum(axis=-1).astype(mx.uint32)
    return Packed(scheme, words, usable(scales_O))


def _schemes(model: Model, paths: Iterable[str]) -> dict[str, Scheme]:
    """The form of the projections and of the embedding."""
    modules = dict(model.named_modules())
    shapes = {path: modules[path].weight.shape for path in [*paths, EMBEDDING]}
    plan = plan_schemes(RECIPE, shapes)
    wrong = [f"{path}: {shapes[path][1]} columns" for path in plan.left_dense if path != EMBEDDING]
    if wrong:
        advice = "Leave them out: --targets names the projections to train."
        raise ConfigError("codes do not fill these widths", expected="a multiple of 32", advice=advice, details=wrong)
    return plan.schemes


def _modules(model: Model, schemes: Mapping[str, Scheme]) -> list[tuple[str, Linear | FusedLinear]]:
    modules = dict(model.named_modules())
    return [(path, modules[path]) for path in schemes if path != EMBEDDING]


def _started(module: Linear | FusedLinear) -> nn.Module:
    weight = module.weight.astype(mx.float32)
    dtype = str(module.weight.dtype).removeprefix("mlx.core.")
    scales = mx.array(quantize_balanced(np.array(weight), dtype=dtype).scales_O)
    if isinstance(module, FusedLinear):
        return QATFusedLinear(weight, scales, module.q_dims, module.kv_dims)
    return QATLinear(weight, scales)


def _quantize_embedding(model: Model, schemes: Mapping[str, Scheme], dtype: mx.Dtype) -> None:
    """Codes of the values in the dtype they are stored in, as `convert` makes them."""
    table = model.model.embedding
    if EMBEDDING in schemes:
        model.model.embedding = quantized(table, pack(table.weight, schemes[EMBEDDING]), dtype)
