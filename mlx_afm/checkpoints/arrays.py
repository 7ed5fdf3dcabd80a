"""Tensors of files to MLX arrays and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.formats.tensors import FLOAT_DTYPES as STORED_FLOATS
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor, to_values

CACHED_VALUES = 1 << 16
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def to_mlx(tensor: LazyTensor) -> mx.array:
    """The values as an MLX array of the same dtype; one copy (float64 becomes float32: Metal has none)."""
    stored = np.ascontiguousarray(tensor.read_stored()).reshape(tensor.shape)  # it makes scalars 1-D
    return _as_mlx(stored, tensor.dtype)


def _as_mlx(values: npt.NDArray[Any], dtype: str) -> mx.array:
    if dtype == "bfloat16":
        return mx.array(values).view(mx.bfloat16)
    return mx.array(values.astype(np.float32) if dtype == "float64" else values)


def from_mlx(array: mx.array) -> LazyTensor:
    """An MLX array as a tensor to be written; evaluated now, since MLX's streams belong to their thread."""
    dtype = str(array.dtype).removeprefix("mlx.core.").removesuffix("_")
    values = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(values)
    return LazyTensor(dtype, tuple(array.shape), lambda: np.array(values))


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """The tensor in another floating dtype, rounded to nearest even when read; others as they are."""
    if dtype is None or dtype == tensor.dtype or tensor.dtype not in STORED_FLOATS:
        return tensor

    def cast_stored(stored_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return from_float32(to_float32(stored_N, tensor.dtype), dtype)

    def whole() -> npt.NDArray[Any]:
        return cast_stored(np.ascontiguousarray(tensor.read_stored()).reshape(-1)).reshape(tensor.shape)

    return LazyTensor(dtype, tensor.shape, whole, lambda: map(cast_stored, tensor.iter_stored()))


def to_float32(stored_N: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Stored elements of a floating dtype (bfloat16 as its bit patterns), widened exactly (float64: rounded)."""
    return to_values(stored_N, dtype).astype(np.float32, copy=False)


def from_float32(values_N: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Float32 values rounded to a floating dtype, nearest even; bfloat16 as its bit patterns."""
    if dtype == "bfloat16":
        return to_bfloat16(values_N)
    with np.errstate(over="ignore"):  # beyond float16's range there is infinity
        return values_N.astype(STORAGE_DTYPES[dtype], copy=False)


def to_bfloat16(values_N: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bit patterns of float32 values (N,) rounded to bfloat16, nearest even; NaN stays NaN.

    Integer arithmetic on pieces that stay in the processor's cache: MLX's CPU cast is several times
    slower, and this one step is most of the time of converting the real checkpoint.
    """
    rounded_N = np.empty(values_N.shape, np.uint16)
    for start in range(0, values_N.size, CACHED_VALUES):
        piece = np.ascontiguousarray(values_N[start : start + CACHED_VALUES])
        bits = piece.view(np.uint32)
        high = bits >> 16
        high &= 1
        high += 0x7FFF
        high += bits
        high >>= 16
        unknown = np.isnan(piece)
        if unknown.any():
            high[unknown] = (bits[unknown] >> 16) | 0x40
        rounded_N[start : start + CACHED_VALUES] = high
    return rounded_N
