"""A quantised matrix and its two uses: a product, and the values themselves.

Shape suffixes: O rows (outputs), N columns (inputs), W words of packed codes, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_afm.model.exponential import on_cpu
from mlx_afm.quant.scheme import BALANCED, Scheme

# Rows of inputs from which MLX's CPU backend is quicker with the matrix made dense, in float32, as measured (see
# docs/quantisation.md). Its quantised product takes as long for each row as for the first.
CPU_DENSE_ROWS = {"affine": 4, BALANCED: 4, "mxfp4": 24, "nvfp4": 24, "mxfp8": 2}
DENSE_VALUES = 1 << 24  # of a matrix, dense at a time; only the embedding is larger
HALF_UNIT = 1 / 32  # keeps sums of balanced codes in float16's range until s makes them small


@dataclass(frozen=True)
class Packed:
    """A matrix (O, N) in codes.

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

    def times(self, x: mx.array) -> mx.array:
        """The product of x (..., N) with the matrix, (..., O), in the dtype of x.

        The gradient goes to x alone. This is the one place that chooses between the quantised product
        and a dense one: the GPU's is good for any number of rows; the CPU's is slow with many, and so
        slow and coarse in 16 bits that there everything is computed in float32.
        """
        if not on_cpu():
            return _kernel(self, x)
        wide = x.astype(mx.float32)
        if prod(x.shape[:-1]) < CPU_DENSE_ROWS[self.scheme.mode]:
            scales = self.scales if self.biases is None else self.scales.astype(mx.float32)
            biases = None if self.biases is None else self.biases.astype(mx.float32)
            return _kernel(Packed(self.scheme, self.weight, scales, biases), wide).astype(x.dtype)
        return _dense_product(self.scheme)(wide, *self.arrays).astype(x.dtype)


def _kernel(packed: Packed, x: mx.array) -> mx.array:
    """MLX's quantised product; balanced codes go in as affine ones of scale 1, and s multiplies the output."""
    scheme = packed.scheme
    if scheme.mode != BALANCED:
        y = mx.quantized_matmul(x, packed.weight, packed.scales, packed.biases, **scheme.to_dict())
        return y.astype(x.dtype)
    unit = HALF_UNIT if x.dtype == mx.float16 else 1.0
    scales, biases = _unit_grid(packed.weight.shape[0], packed.columns // scheme.group_size, unit, x.dtype)
    y = mx.quantized_matmul(x, packed.weight, scales, biases, group_size=scheme.group_size, bits=2)
    return (y.astype(mx.float32) * (packed.scales if unit == 1 else packed.scales / unit)).astype(x.dtype)


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
        return (_codes(weight, 2) - 1.5) * scales[..., None]
    if biases is not None and on_cpu():
        codes = _codes(weight, scheme.bits).reshape(*scales.shape, scheme.group_size)
        values = codes * scales[..., None].astype(mx.float32) + biases[..., None].astype(mx.float32)
        return values.reshape(*weight.shape[:-1], -1)
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, dtype=mx.float32, **scheme.to_dict())


def _codes(weight: mx.array, bits: int) -> mx.array:
    """The codes in words, float32 (..., N); shifting them out beats the CPU's mx.dequantize by far."""
    *leading, words = weight.shape
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        codes = (weight[..., None] >> mx.array(np.arange(0, 32, bits, dtype=np.uint32))) & mx.array(mask, mx.uint32)
        return codes.reshape(*leading, words * 32 // bits).astype(mx.float32)
    octets = weight.view(mx.uint8).reshape(*leading, -1, bits).astype(mx.uint16)  # eight codes each
    parts = []
    for number in range(8):
        place, shift = divmod(number * bits, 8)
        wide = octets[..., place]
        if shift + bits > 8:
            wide = wide | octets[..., place + 1] << 8
        parts.append((wide >> shift) & mask)
    return mx.stack(parts, axis=-1).reshape(*leading, words * 32 // bits).astype(mx.float32)


@cache
def _dense_product(scheme: Scheme) -> Callable[..., mx.array]:
    """The product with the values made dense, again in the backward pass, so that nothing keeps them.

    Large matrices are taken in pieces of rows.
    """

    def pieces(arrays: tuple[mx.array, ...]) -> list[slice]:
        rows, words = arrays[0].shape
        step = max(1, DENSE_VALUES // (words * 32 // scheme.bits))
        return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]

    def dense(arrays: tuple[mx.array, ...], piece: slice) -> mx.array:
        return _values(scheme, *(array[piece] for array in arrays))

    @mx.custom_function
    def product(x: mx.array, *arrays: mx.array) -> mx.array:
        parts = [x @ dense(arrays, piece).T for piece in pieces(arrays)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    @product.vjp
    def _(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        arrays = tuple(primals[1:])
        gradient = sum(cotangent[..., piece] @ dense(arrays, piece) for piece in pieces(arrays))
        return (gradient, *(mx.zeros_like(array) for array in arrays))  # type: ignore[arg-type]

    return product  # type: ignore[return-value]
