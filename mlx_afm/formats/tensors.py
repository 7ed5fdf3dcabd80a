"""The one type that travels between file formats: a tensor whose values come on demand.

NumPy has no bfloat16, so a bfloat16 tensor is stored as uint16 bit patterns. What a tensor stores and what it is worth
are therefore two methods: `read_stored` and `read_values`. Only values may be computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import TensorsError

BLOCK_BYTES = 1 << 26  # what one read, cast or write handles at a time

# Name of a dtype -> NumPy dtype of what is stored. NumPy has no bfloat16: its bit patterns travel as uint16.
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


FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
# Of each float dtype: the unsigned integer of the same width, and the bits that are all set if a value is not finite.
_EXPONENTS: dict[str, tuple[str, int]] = {
    "float64": ("<u8", 0x7FF << 52),
    "float32": ("<u4", 0x7F800000),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
}
_CACHED_VALUES = 1 << 16

OnBytes = Callable[[int], None]
Piece = TypeVar("Piece")


def ignore_bytes(count: int) -> None:
    """Nobody is told."""


def told(pieces: Iterator[memoryview], on_bytes: OnBytes) -> Iterator[memoryview]:
    """The pieces; each is reported once it was taken and the next is asked for."""
    for piece in pieces:
        yield piece
        on_bytes(len(piece))


def read_ahead(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces, each made in a thread of its own while the one before is used; what makes them must not touch MLX.

    Cost: one piece more in memory.
    """
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(next, pieces, None)
        while (piece := upcoming.result()) is not None:
            upcoming = worker.submit(next, pieces, None)
            yield piece


def to_values(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The numbers that stored elements stand for: bfloat16 bit patterns widened exactly to float32, others as they are.

    Example: uint16 [0x3F80, 0xC000] of dtype "bfloat16" -> float32 [1.0, -2.0].
    """
    if dtype != "bfloat16":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def count_nonfinite(stored: npt.NDArray[Any], dtype: str) -> int:
    """How many stored elements are NaN or infinite.

    Cost: one pass at about the speed of memory, which `np.isfinite` is ten times slower than.
    """
    if dtype not in _EXPONENTS:
        return 0
    unsigned, exponent = _EXPONENTS[dtype]
    flat, count = np.ascontiguousarray(stored).reshape(-1).view(unsigned), 0
    mask = flat.dtype.type(exponent)
    for start in range(0, flat.size, _CACHED_VALUES):
        exponents = flat[start : start + _CACHED_VALUES] & mask
        if exponents.max() == mask:
            count += int(np.count_nonzero(exponents == mask))
    return count


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file read, or of a file about to be written.

    Attributes:
        dtype: a key of `STORAGE_DTYPES`.
        shape: sizes; () for a scalar.
        read_stored: gives what a file stores, of dtype `STORAGE_DTYPES[dtype]` and this shape: of bfloat16 bit
            patterns, not numbers. To be copied, cut or compared bit for bit; numbers come from `read_values`. For
            tensors of a file it is a view of the memory map, so calling it costs no memory until the elements are
            touched. Not necessarily contiguous.
        stream_stored: gives the same flat, in row-major order, a block at a time, for tensors that are computed while
            they are written; None if `read_stored` is cheap.
    """

    dtype: str
    shape: tuple[int, ...]
    read_stored: Callable[[], npt.NDArray[Any]]
    stream_stored: Callable[[], Iterator[npt.NDArray[Any]]] | None = None

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> LazyTensor:
        """Wraps an array in memory (for bfloat16 use the constructor: NumPy cannot name it)."""
        return cls(array.dtype.name, array.shape, lambda: array)

    def read_values(self) -> npt.NDArray[Any]:
        """The numbers, of this shape: float32 for bfloat16 (exact), else of dtype `STORAGE_DTYPES[dtype]`.

        Cost: of bfloat16 a copy; else that of `read_stored`.
        """
        return to_values(self.read_stored(), self.dtype)

    def iter_stored(self) -> Iterator[npt.NDArray[Any]]:
        """What `read_stored` gives, flat, in row-major order, at most `BLOCK_BYTES` at a time.

        Cost: a copy only of tensors that are not contiguous.
        """
        if self.stream_stored is not None:
            yield from self.stream_stored()
            return
        flat = np.ascontiguousarray(self.read_stored()).reshape(-1)
        step = BLOCK_BYTES // STORAGE_DTYPES[self.dtype].itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def count_nonfinite(self) -> int:
        """How many values are NaN or infinite; the tensor is read once, a block at a time."""
        if self.dtype not in FLOAT_DTYPES:
            return 0
        return sum(count_nonfinite(block, self.dtype) for block in self.iter_stored())

    def iter_bytes(self, where: object) -> Iterator[memoryview]:
        """The bytes of the values as a file holds them.

        Raises:
            TensorsError: the values are not of the promised dtype or number.
        """
        written = 0
        for block in self.iter_stored():
            if block.dtype != STORAGE_DTYPES[self.dtype]:
                raise TensorsError(
                    "not the promised tensor",
                    where=where,
                    expected=STORAGE_DTYPES[self.dtype],
                    found=block.dtype,
                )
            written += block.nbytes
            yield block.view(np.uint8).data
        if written != self.nbytes:
            expected, found = f"{self.nbytes} bytes", f"{written} bytes"
            raise TensorsError("not the promised tensor", where=where, expected=expected, found=found)

    def same_stored(self, other: LazyTensor) -> bool:
        """Whether both have the same dtype and shape and store the same bits; NaN is equal to the same NaN."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pieces = zip(self.iter_bytes("first"), other.iter_bytes("second"), strict=True)
        return all(one == two for one, two in pieces)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return self.size * STORAGE_DTYPES[self.dtype].itemsize
