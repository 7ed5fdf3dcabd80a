"""Products with quantized weights on MLX's CPU backend, and their values.

Its quantized product takes as long for each row of inputs as for the first, and in 16 bits is so slow and coarse that
everything is computed in float32. From a few rows on it is quicker to make the matrix dense.

Shape suffixes: O rows (outputs), N columns (inputs), W words of packed codes, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import mlx.core as mx
import numpy as np

from mlx_afm.quant.scheme import BALANCED, Scheme

# Rows of inputs from which the dense product is quicker, as measured (docs/quantization.md).
DENSE_ROWS = {"affine": 4, BALANCED: 4, "mxfp4": 24, "nvfp4": 24, "mxfp8": 2}
DENSE_VALUES = 1 << 24  # of a matrix, dense at a time; only the embedding is larger


def product(scheme: Scheme, x: mx.array, *arrays: mx.array) -> mx.array:
    """The product of x (..., N) with a matrix, (..., O), computed in float32, in x's dtype; gradient to x alone.

    Args:
        arrays: codes (O, W), scales and, of affine, biases.
    """
    wide = x.astype(mx.float32)
    if prod(x.shape[:-1]) >= DENSE_ROWS[scheme.mode]:
        return _dense_product(scheme)(wide, *arrays).astype(x.dtype)
    weight, scales, *biases = arrays
    if scheme.mode == BALANCED:
        unit, offset = _unit_grid(weight.shape[0], weight.shape[1] * 16 // scheme.group_size)
        y = mx.quantized_matmul(wide, weight, unit, offset, group_size=scheme.group_size, bits=2) * scales
    elif biases:
        grids = scales.astype(mx.float32), biases[0].astype(mx.float32)
        y = mx.quantized_matmul(wide, weight, *grids, **scheme.to_dict())
    else:
        y = mx.quantized_matmul(wide, weight, scales, **scheme.to_dict())
    return y.astype(x.dtype)


@cache
def _unit_grid(rows: int, groups: int) -> tuple[mx.array, mx.array]:
    """Scales of one and biases of -1.5."""
    ones = np.ones((rows, groups), np.float32)  # from NumPy, so that a compiled function takes them for constants
    scales, biases = mx.array(ones), mx.array(-1.5 * ones)
    mx.eval(scales, biases)
    return scales, biases


def values(scheme: Scheme, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
    """The values (..., N) of codes (..., W), float32."""
    if scheme.mode == BALANCED:
        return (unpack(weight, 2) - 1.5) * scales[..., None]
    if biases is not None:
        return affine_values(scheme, weight, scales, biases)
    return mx.dequantize(weight, scales, dtype=mx.float32, **scheme.to_dict())


def affine_values(scheme: Scheme, weight: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """The values (..., N) of affine codes, float32."""
    codes = unpack(weight, scheme.bits).reshape(*scales.shape, scheme.group_size)
    values = codes * scales[..., None].astype(mx.float32) + biases[..., None].astype(mx.float32)
    return values.reshape(*weight.shape[:-1], -1)


def unpack(weight: mx.array, bits: int) -> mx.array:
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
        return values(scheme, *(array[piece] for array in arrays))

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
