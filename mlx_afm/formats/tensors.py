"""The one type that travels between file formats: a tensor whose values come on demand."""

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


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file read, or of a file about to be written.

    Attributes:
        dtype: a key of `STORAGE_DTYPES`.
        shape: sizes; () for a scalar.
        read: gives the values, of dtype `STORAGE_DTYPES[dtype]` and this shape. For tensors of a
            file it is a view of the memory map, so calling it costs no memory until the values are
            touched. Not necessarily contiguous.
        stream: gives the same values flat, in row-major order, a block at a time, for tensors that are
            computed while they are written; None if `read` is cheap.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]
    stream: Callable[[], Iterator[npt.NDArray[Any]]] | None = None

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> LazyTensor:
        """Wraps an array in memory (for bfloat16 use the constructor: NumPy cannot name it)."""
        return cls(array.dtype.name, array.shape, lambda: array)

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The values flat, in row-major order, at most `BLOCK_BYTES` at a time.

        Cost: a copy only of tensors that are not contiguous.
        """
        if self.stream is not None:
            yield from self.stream()
            return
        flat = np.ascontiguousarray(self.read()).reshape(-1)
        step = BLOCK_BYTES // STORAGE_DTYPES[self.dtype].itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def iter_bytes(self, where: object) -> Iterator[memoryview]:
        """The bytes of the values as a file holds them.

        Raises:
            TensorsError: the values are not of the promised dtype or number.
        """
        written = 0
        for block in self.blocks():
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

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return self.size * STORAGE_DTYPES[self.dtype].itemsize
