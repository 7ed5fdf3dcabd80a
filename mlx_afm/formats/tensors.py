"""The one type that travels between file formats: a tensor whose values come on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

# Name of a dtype -> NumPy dtype of its values. NumPy has no bfloat16: its bit patterns travel as uint16.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file read, or of a file about to be written.

    Attributes:
        dtype: a key of `STORAGE_DTYPES`.
        shape: sizes; () for a scalar.
        read: gives the values, of dtype `STORAGE_DTYPES[dtype]` and this shape. For tensors of a
            file it is a view of the memory map, so calling it costs no memory until the values are
            touched. Not necessarily contiguous.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> LazyTensor:
        """Wraps an array in memory (for bfloat16 use the constructor: NumPy cannot name it)."""
        return cls(array.dtype.name, array.shape, lambda: array)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return self.size * STORAGE_DTYPES[self.dtype].itemsize
