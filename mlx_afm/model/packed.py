"""A quantized matrix and its two uses: a product, and the values themselves.

Shape suffixes: O rows (outputs), N columns (inputs), W words of packed codes, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_afm.model import backend
from mlx_afm.model.cpu import quantized as on_the_cpu
from mlx_afm.quant.scheme import BALANCED, Scheme

GROUP_SIZES = (128, 64, 32)  # that MLX has; balanced codes may take any, and the largest has the fewest scales to read
HALF_UNIT = 1 / 32  # keeps sums of balanced codes in float16's range until s makes them small


@dataclass(frozen=True)
class Packed:
    """A quantized matrix (O, N).

    Attributes:
        scheme: what the codes mean.
        weight: uint32 (O, W).
        scales: (O, G); of balanced (O,), float32.
        biases: (O, G), of affine only.
    """

    scheme: Scheme
    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None

    def __getitem__(self, rows: Any) -> Packed:
        """Some of the rows; any index, (..., W) for an index of shape (...)."""
        biases = None if self.biases is None else self.biases[rows]
        return Packed(self.scheme, self.weight[rows], self.scales[rows], biases)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Codes, scales and, of affine, biases."""
        return (self.weight, self.scales, *(() if self.biases is None else (self.biases,)))

    @property
    def columns(self) -> int:
        """How many columns the matrix has."""
        return int(self.weight.shape[-1]) * 32 // self.scheme.bits

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The values (..., N): computed in float32, rounded once."""
        return _values(self.scheme, *self.arrays).astype(dtype)

    def times(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """The product of x (..., N) with the matrix, (..., O), in the dtype of x; `residual` (..., O) is added to it.

        The gradient goes to x and to the residual.
        """
        if backend.on_cpu():
            y = on_the_cpu.product(self.scheme, x, *self.arrays)
            return y if residual is None else residual + y
        if self.scheme.mode == BALANCED:
            y, scales = self.unscaled(x), self.unit_scales(x.dtype)
            return _scaled(y, scales) if residual is None else _scaled_plus(y, scales, residual)
        y = mx.quantized_matmul(x, self.weight, self.scales, self.biases, **self.scheme.to_dict()).astype(x.dtype)
        return y if residual is None else residual + y

    def unscaled(self, x: mx.array) -> mx.array:
        """The product of x (..., N) with balanced codes, whose columns are still to be multiplied by `unit_scales`.

        The codes go into MLX's product as affine ones of scale 1.
        """
        group_size = max(size for size in GROUP_SIZES if self.columns % size == 0)
        scales, biases = _unit_grid(self.weight.shape[0], self.columns // group_size, _unit(x.dtype), x.dtype)
        return mx.quantized_matmul(x, self.weight, scales, biases, group_size=group_size, bits=2)

    def unit_scales(self, dtype: mx.Dtype) -> mx.array:
        """The scales (O,) of balanced codes, float32, for products in a dtype."""
        return self.scales if _unit(dtype) == 1 else self.scales / _unit(dtype)


def _unit(dtype: mx.Dtype) -> float:
    return HALF_UNIT if dtype == mx.float16 else 1.0


@backend.one_kernel
def _scaled(y: mx.array, scales: mx.array) -> mx.array:
    return (y.astype(mx.float32) * scales).astype(y.dtype)


@backend.one_kernel
def _scaled_plus(y: mx.array, scales: mx.array, residual: mx.array) -> mx.array:
    return (y.astype(mx.float32) * scales + residual.astype(mx.float32)).astype(residual.dtype)


@cache
def _unit_grid(rows: int, groups: int, unit: float, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scales of one and biases of -1.5 for a shape, shared by all matrices that have it."""
    ones = np.full((rows, groups), unit, np.float32)
    scales, biases = mx.array(ones).astype(dtype), mx.array(-1.5 * ones).astype(dtype)
    mx.eval(scales, biases)
    return scales, biases


def _values(scheme: Scheme, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
    """The values (..., N) of codes (..., W), float32."""
    if scheme.mode == BALANCED:
        return (on_the_cpu.unpack(weight, 2) - 1.5) * scales[..., None]
    if biases is not None and backend.on_cpu():
        return on_the_cpu.affine_values(scheme, weight, scales, biases)
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, dtype=mx.float32, **scheme.to_dict())
