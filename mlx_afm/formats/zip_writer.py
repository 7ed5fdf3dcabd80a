"""Uncompressed zip archives as torch writes them: data aligned for memory-mapping, written in one pass.

Byte layout: that of `zip_reader`, with these choices, all of them torch's:

- Versions, times, dates and attributes are 0; flags are 0x0808 (UTF-8 name, data descriptor).
- CRC and sizes are 0 in the local header and true in the descriptor and the directory. A member without data
  has flags 0x0800 and no descriptor.
- Extra field "FB", filled with "Z", makes data begin at a multiple of 64.
- A member of 4 GiB - 1 or more, or that begins at or beyond that offset, has a zip64 extra field (before "FB", and in
  the directory) and a descriptor with 64-bit sizes.
- zip64 end record and locator are always written.

Limits: none but those of the reader (`MAX_MEMBERS`, `MAX_DIRECTORY_BYTES`).
Versions: the layout of torch 2.15.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

ALIGNMENT = 64
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


class Written(NamedTuple):
    """A member as it goes into the directory."""

    name: bytes
    crc: int
    size: int
    header: int


class ZipWriter:
    """Writes members one after another; `finish` writes the directory."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.at = 0
        self.members: list[Written] = []

    def add(self, name: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes a member of `size` bytes, which `pieces` must add up to."""
        encoded, header, crc, written = name.encode("utf-8"), self.at, 0, 0
        self._write(local_header(encoded, size, header))
        for piece in pieces:
            crc, written = zlib.crc32(piece, crc), written + len(piece)
            self._write(piece)
        assert written == size, f"{name}: {written} bytes instead of {size}"
        member = Written(encoded, crc, size, header)
        self._write(descriptor(member))
        self.members.append(member)

    def finish(self) -> None:
        """Writes directory and end records."""
        start = self.at
        for member in self.members:
            self._write(directory_entry(member))
        self._write(end_records(len(self.members), start, self.at - start))

    def _write(self, piece: bytes | memoryview) -> None:
        self.handle.write(piece)
        self.at += len(piece)


def _flags(size: int) -> int:
    return 0x0808 if size else 0x0800


def _zip64_extra(size: int, header: int) -> bytes:
    """Extra field 1 with the numbers that do not fit into 32 bits; nothing if all do."""
    wide = [size, size] if size >= _FULL32 else []
    wide += [header] if header >= _FULL32 else []
    return struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""


def local_header(name: bytes, size: int, header: int) -> bytes:
    """Local header at byte `header` of a member of `size` bytes, up to where its data begins."""
    extra = _zip64_extra(size, header)
    padding = -(header + 30 + len(name) + len(extra) + 4) % ALIGNMENT
    extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    fields = (b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return struct.pack("<4s5H3I2H", *fields) + name + extra


def descriptor(member: Written) -> bytes:
    """What follows a member's data."""
    if not member.size:
        return b""
    form = "<4sI2Q" if _zip64_extra(member.size, member.header) else "<4s3I"
    return struct.pack(form, b"PK\7\10", member.crc, member.size, member.size)


def directory_entry(member: Written) -> bytes:
    """A member's entry in the directory."""
    extra = _zip64_extra(member.size, member.header)
    size, header = min(member.size, _FULL32), min(member.header, _FULL32)
    fields = (0, 0, _flags(member.size), 0, 0, 0, member.crc, size, size, len(member.name), len(extra))
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields, 0, 0, 0, 0, header) + member.name + extra


def end_records(count: int, offset: int, size: int) -> bytes:
    """The three records after a directory of `count` entries and `size` bytes at byte `offset`."""
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    small = min(count, _FULL16)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, small, small, min(size, _FULL32), min(offset, _FULL32), 0)
    return wide + locator + end
