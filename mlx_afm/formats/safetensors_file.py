"""Safetensors files: an 8-byte little-endian header length, a JSON header, then raw values.

The header maps each name to {"dtype", "shape", "data_offsets": [start, end]}, offsets counted from
the end of the header; "__metadata__" maps strings to strings. Values are little-endian, row-major,
without gaps. Limits: a header of at most 100 MB, ranges inside the file, no overlap.

Ours rather than the `safetensors` package because NumPy has no bfloat16 and because a model is
written tensor by tensor: one tensor in memory, never the whole file.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.files import OpenFiles, WriteOut, atomic_file
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor, OnBytes, ignore_bytes, read_ahead

Content = bytes | mmap.mmap
MAX_HEADER_BYTES = 100_000_000
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def read_safetensors(path: Path, files: OpenFiles | None = None) -> dict[str, LazyTensor]:
    """The tensors of a file, memory-mapped, in the order of its header.

    Args:
        path: the file.
        files: keeps it open for others, or has it open.

    Raises:
        FormatError: not a safetensors file, or an entry that does not fit the file.
    """
    data = (files or OpenFiles()).read(path)
    header, start = _read_header(data, path)
    header.pop("__metadata__", None)
    _require_apart(header, path)
    return {name: _tensor(data, start, entry, f"{path}, tensor {name}") for name, entry in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors; empty if nothing.

    Raises:
        FormatError: not a safetensors file, or metadata that does not map strings to strings.
    """
    metadata = _read_header(OpenFiles().read(path), path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("the metadata does not map strings to strings", where=path)
    return metadata


def _read_header(data: Content, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the values start."""
    prefix, size = data[:8], len(data)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise FormatError("not a safetensors file", where=path, expected="a header length", found=length)
    return _parse_header(data[8 : 8 + length], path), 8 + length


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError("the header is not JSON", where=path) from error
    if not isinstance(header, dict):
        raise FormatError("the header is not a JSON object", where=path)
    return header


def _require_apart(header: dict[str, Any], path: Path) -> None:
    """Ranges that overlap are a trick: one byte must not be two tensors."""
    ranges = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    whole = [tuple(ends) for ends in ranges if isinstance(ends, list) and len(ends) == 2]
    ordered = sorted(ends for ends in whole if all(type(end) is int for end in ends) and ends[0] < ends[1])
    for (_, last), (first, _) in pairwise(ordered):
        if first < last:
            raise FormatError("tensors overlap", where=f"{path}, byte {first} of the values")


def _tensor(data: Content, start: int, entry: Any, where: str) -> LazyTensor:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("damaged header entry", where=where, found=entry) from error
    if not all(type(value) is int and value >= 0 for value in (*shape, first, last)):
        raise FormatError("sizes and offsets must be whole numbers", where=where, found=entry)
    tensor = LazyTensor(dtype, shape, partial(_view, data, dtype, shape, start + first))
    if last - first != tensor.nbytes or start + last > len(data):
        raise FormatError("the values do not fit", where=where, expected=f"{tensor.nbytes} bytes", found=entry)
    return tensor


def _view(data: Content, dtype: str, shape: tuple[int, ...], offset: int) -> npt.NDArray[Any]:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data, STORAGE_DTYPES[dtype], count, offset).reshape(shape)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes = ignore_bytes,
    ahead: bool = True,
) -> None:
    """Writes a file atomically, one block of a tensor at a time. Same tensors, same bytes.

    `on_bytes` is told how many bytes of values were just written. With `ahead` blocks are made in a thread of
    their own; without it in this one, which is where MLX can compute them.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        entry = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_file(path, 8 + len(raw) + offset) as partial_path, partial_path.open("wb") as handle:
        write_out = WriteOut(handle)
        handle.write(struct.pack("<Q", len(raw)))
        handle.write(raw)
        pieces = _pieces(tensors, path)
        for piece in read_ahead(pieces) if ahead else pieces:
            handle.write(piece)
            write_out.add(len(piece))
            on_bytes(len(piece))


def _pieces(tensors: Mapping[str, LazyTensor], path: Path) -> Iterator[memoryview]:
    for name, tensor in tensors.items():
        yield from tensor.iter_bytes(f"{path}, tensor {name}")
