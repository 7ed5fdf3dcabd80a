"""Core ML "MIL blob storage", version 2: the container of `adapter_weights.bin` and `draft_weights.bin`.

Little-endian; every block starts on a multiple of 64 bytes, and zeros fill the gaps::

    0     file header     u32 count, u32 version = 2, 56 zero bytes
    64    metadata 0      u32 sentinel 0xDEADBEEF, u32 type code, u64 payload bytes, u64 payload offset
                          (own offset + 64), u64 unused bits in the last payload byte, 32 zero bytes
    128   payload 0       row-major values; no names, no shapes
    ...   metadata 1, payload 1, ...; nothing follows the last payload, not even padding

Types narrower than a byte are packed with the first element in the lowest bits. Their values are handed
out as packed bytes; bfloat16 and the two float8 types as bit patterns, since NumPy cannot name them.

The writer makes fp16 records only. The reader knows every type of version 2, refuses other versions and
unknown types, and takes at most `MAX_RECORDS` records. It is stricter than Core ML's own reader, which
looks at version, sentinel, type and bounds only.

Rules of `walk_blobs`: C1 size, C2 version, C3 header zeros, C4 count, C5 sentinel, C6 type code, C7 payload
offset, C8 alignment, C9 bounds, C10 whole elements, C11 unused bits, C12 metadata zeros, C13 zeros between
blocks, C14 nothing at the end.

Source: coremltools' StorageFormat.hpp and BlobDataType.hpp; bytes compared with coremltools in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.files import atomic_file, require_not_lfs_pointer

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
FP16 = 1
MAX_RECORDS = 65_536

_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class BlobType:
    """What a type code stands for: its name, element width, and the NumPy dtype `Blob.read` gives."""

    name: str
    bits: int
    values: str


# The codes are not in order of width: uint4 is 11 and uint3 is 12.
TYPES: dict[int, BlobType] = {
    1: BlobType("fp16", 16, "<f2"),
    2: BlobType("fp32", 32, "<f4"),
    3: BlobType("uint8", 8, "u1"),
    4: BlobType("int8", 8, "i1"),
    5: BlobType("bf16", 16, "<u2"),
    6: BlobType("int16", 16, "<i2"),
    7: BlobType("uint16", 16, "<u2"),
    8: BlobType("int4", 4, "u1"),
    9: BlobType("uint1", 1, "u1"),
    10: BlobType("uint2", 2, "u1"),
    11: BlobType("uint4", 4, "u1"),
    12: BlobType("uint3", 3, "u1"),
    13: BlobType("uint6", 6, "u1"),
    14: BlobType("int32", 32, "<i4"),
    15: BlobType("uint32", 32, "<u4"),
    16: BlobType("fp8e4m3fn", 8, "u1"),
    17: BlobType("fp8e5m2", 8, "u1"),
}

Bytes = npt.NDArray[np.uint8]
Found = Callable[[str, str], None]


@dataclass(frozen=True)
class Blob:
    """One record of a blob file.

    Attributes:
        type_code: a key of `TYPES`.
        metadata_offset: where its metadata block lies; MIL programs name a record by this number.
        offset: where its payload lies.
        nbytes: payload size, without padding.
        padding_bits: unused bits in the last payload byte.
    """

    type_code: int
    metadata_offset: int
    offset: int
    nbytes: int
    padding_bits: int
    file_bytes: Bytes = field(repr=False, compare=False)

    @property
    def dtype(self) -> str:
        """Name of the element type, e.g. "fp16"."""
        return TYPES[self.type_code].name

    def read(self) -> npt.NDArray[Any]:
        """The flat values: a view of the memory map, so it costs no memory until touched."""
        return self.file_bytes[self.offset : self.offset + self.nbytes].view(TYPES[self.type_code].values)


def blob_file_bytes(payloads: Iterable[int]) -> int:
    """Size of a blob file with payloads of these sizes in bytes."""
    end = _HEADER.size
    for nbytes in payloads:
        end = _aligned(end) + _METADATA.size + nbytes
    return end


def write_blobs(path: Path, records: Iterable[npt.NDArray[np.float16]]) -> None:
    """Writes fp16 arrays as a blob file, in order, replacing `path` only when all are written.

    Raises:
        FormatError: a record is not float16; `path` is as it was.

    Cost: one record in memory at a time.
    """
    with atomic_file(path) as partial, partial.open("wb") as out:
        out.write(_HEADER.pack(0, VERSION))
        count, end = 0, _HEADER.size
        for array in records:
            if array.dtype.name != "float16":
                raise FormatError("not a float16 array", where=f"{path}, record {count}", found=array.dtype)
            payload = np.ascontiguousarray(array, dtype="<f2")
            start = _aligned(end)
            out.write(bytes(start - end))
            out.write(_METADATA.pack(SENTINEL, FP16, payload.nbytes, start + _METADATA.size, 0))
            out.write(payload.reshape(-1).view(np.uint8).data)
            count, end = count + 1, start + _METADATA.size + payload.nbytes
        out.seek(0)
        out.write(_HEADER.pack(count, VERSION))


def read_blobs(path: Path) -> list[Blob]:
    """The records of a blob file that keeps every rule.

    Raises:
        FormatError: the file cannot be read or breaks a rule; all faults found are in one error.

    Cost: the file is memory-mapped; only headers are read.
    """
    faults: list[str] = []
    blobs = walk_blobs(map_bytes(path), lambda rule, message: faults.append(f"{rule}: {message}"))
    if faults:
        raise FormatError(
            "not a sound MIL blob file",
            where=path,
            advice="The file is damaged or of another format; copy or export it again",
            details=faults[:_SHOWN_FAULTS] + ([f"... {len(faults)} faults in all"] * (len(faults) > _SHOWN_FAULTS)),
        )
    return blobs


def map_bytes(path: Path) -> Bytes:
    """The bytes of a regular file as a read-only memory map (an empty array for an empty file).

    Raises:
        FormatError: not a regular file, or it cannot be opened.
    """
    try:
        if path.is_file():
            require_not_lfs_pointer(path)
            # asarray: a plain view, so that what is computed from it is no memmap of its own.
            return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.zeros(0, np.uint8)
    except FormatError:
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be read: {error}", where=path) from error
    raise FormatError("not a regular file" if path.exists() else "no such file", where=path)


def walk_blobs(data: Bytes, found: Found) -> list[Blob]:
    """The records that can be located in `data`; every broken rule is told to `found(rule, message)`.

    Never raises, whatever the bytes are. A fault that hides where the next record starts ends the walk.
    """
    if len(data) < _HEADER.size:
        found("C1", f"{len(data)} bytes: shorter than the {_HEADER.size}-byte file header")
        return []
    count, version = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if version != VERSION:
        found("C2", f"blob storage version {version}, expected {VERSION}")
        return []
    if data[8 : _HEADER.size].any():
        found("C3", f"reserved bytes 8 to {_HEADER.size - 1} of the file header are not zero")
    blobs: list[Blob] = []
    end = _HEADER.size
    for index in range(count):
        start = _aligned(end)
        if index == MAX_RECORDS or start + _METADATA.size > len(data):
            limit = "more than a package can hold" if index == MAX_RECORDS else f"the file ends after {index}"
            found("C4", f"the header announces {count} records, {limit}")
            return blobs
        blob = _blob_at(data, index, start, found)
        if blob is None:
            return blobs
        blobs.append(blob)
        end = blob.offset + blob.nbytes
        if data[end : _aligned(end)].any():
            found("C13", f"record {index}: the bytes between its payload and {_aligned(end)} are not zero")
    if end < len(data):
        found("C14", f"{len(data) - end} bytes follow the last payload, which ends at {end}")
    return blobs


def _blob_at(data: Bytes, index: int, start: int, found: Found) -> Blob | None:
    """The record whose metadata lies at `start`, or None when the walk cannot go on."""
    sentinel, code, nbytes, offset, padding = _METADATA.unpack(data[start : start + _METADATA.size].tobytes())
    where = f"record {index} at {start}"
    if sentinel != SENTINEL:
        found("C5", f"{where}: sentinel {sentinel:#010x}, expected {SENTINEL:#010x}")
        return None
    if code not in TYPES:
        found("C6", f"{where}: unknown type code {code}")
        return None
    if offset != start + _METADATA.size:
        found("C7", f"{where}: payload offset {offset}, expected {start + _METADATA.size}")
    if offset % ALIGNMENT:
        found("C8", f"{where}: payload offset {offset} is not a multiple of {ALIGNMENT}")
    if offset < start + _METADATA.size or offset + nbytes > len(data):
        found("C9", f"{where}: payload {offset} to {offset + nbytes} does not fit the {len(data)}-byte file")
        return None
    kind = TYPES[code]
    if kind.bits >= 8 and nbytes % (kind.bits // 8):
        found("C10", f"{where}: {nbytes} bytes are no whole number of {kind.name} elements")
    if not _padding_fits(kind, nbytes, padding):
        found("C11", f"{where}: {padding} unused bits do not fit {nbytes} bytes of {kind.name}")
    if data[start + 32 : start + _METADATA.size].any():
        found("C12", f"{where}: reserved bytes of the metadata are not zero")
    return Blob(code, start, offset, nbytes, padding, data)


def _padding_fits(kind: BlobType, nbytes: int, padding: int) -> bool:
    if kind.bits >= 8:
        return padding == 0
    return padding < 8 and padding <= nbytes * 8 and (nbytes * 8 - padding) % kind.bits == 0


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
