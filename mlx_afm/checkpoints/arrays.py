"""Tensors of files to MLX arrays and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.formats.tensors import LazyTensor

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def to_mlx(tensor: LazyTensor) -> mx.array:
    """The values as an MLX array of the same dtype; one copy (float64 becomes float32: Metal has none)."""
    return _as_mlx(np.ascontiguousarray(tensor.read()).reshape(tensor.shape), tensor.dtype)  # it makes scalars 1-D


def _as_mlx(values: npt.NDArray[Any], dtype: str) -> mx.array:
    if dtype == "bfloat16":
        return mx.array(values).view(mx.bfloat16)
    return mx.array(values.astype(np.float32) if dtype == "float64" else values)


def from_mlx(array: mx.array) -> LazyTensor:
    """An MLX array as a tensor to be written."""
    dtype = str(array.dtype).removeprefix("mlx.core.").removesuffix("_")
    return LazyTensor(dtype, tuple(array.shape), lambda: _to_numpy(array))


def _to_numpy(array: mx.array) -> npt.NDArray[Any]:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """The tensor in another floating dtype, rounded to nearest even when read; others as they are."""
    if dtype is None or dtype == tensor.dtype or tensor.dtype not in (*FLOAT_DTYPES, "float64"):
        return tensor
    wanted = getattr(mx, dtype)

    def in_blocks() -> Iterator[npt.NDArray[Any]]:
        for block in tensor.blocks():
            yield _to_numpy(_as_mlx(block, tensor.dtype).astype(wanted))

    return LazyTensor(dtype, tensor.shape, lambda: _to_numpy(to_mlx(tensor).astype(wanted)), in_blocks)
