"""Where the members of an uncompressed zip archive lie, so that they can be memory-mapped.

Own parser, because `zipfile` insists on CRCs (torch may leave them 0), reads members through a copy, and accepts
archives that overlap or contradict themselves.

Byte layout, little-endian; sizes in bytes:

    per member   local header (30): PK 03 04, version, flags, method, time, date, CRC u32, packed u32, size u32,
                 name length u16, extra length u16; name; extra; DATA; descriptor if flag 8 (CRC and sizes)
    directory    per member (46): PK 01 02, two versions, flags, method, time, date, CRC, packed, size, lengths of
                 name, extra and comment u16, disk u16, attributes u16 u32, local header offset u32; name; extra
    zip64        a u32 of ffffffff stands in extra field 1 as u64, in the order size, packed, offset;
                 end record (56): PK 06 06, counts, directory size and offset u64; locator (20): PK 06 07
    end          (22): PK 05 06, disks, counts u16, directory size u32, offset u32, comment length 0

The directory is the truth; data begins at local offset + 30 + both lengths of the *local* header.

Limits: `MAX_MEMBERS`, `MAX_DIRECTORY_BYTES`, `MAX_NAME_BYTES`. Refused: compression, encryption, several disks, bytes
before the first or after the last structure of the tail, a comment, names that occur twice or that `is_plain_name`
refuses, members that overlap, leave the file or differ between directory and local header. CRCs are not looked at.
Versions: the "version" fields are ignored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from mmap import mmap
from typing import NamedTuple, NoReturn

from mlx_afm.errors import FormatError

MAX_MEMBERS = 1 << 14  # a pickle of `torch_opcodes` can name no more storages
MAX_DIRECTORY_BYTES = 4 << 20
MAX_NAME_BYTES = 512  # of a member; file systems allow 255 to the folder in it
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_HARMLESS_FLAGS = 0x0800 | 0x0008 | 0x0006  # UTF-8 names, data descriptor, two bits of compression level

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


class Member(NamedTuple):
    """Place of a member's data in the file."""

    offset: int
    size: int


class _Entry(NamedTuple):
    name: bytes
    size: int
    header: int


class _Directory(NamedTuple):
    members: int
    offset: int
    size: int


def read_members(data: bytes | mmap, where: object) -> dict[str, Member]:
    """Members by name, in the directory's order. Holds no values: about 300 bytes a member.

    Raises:
        FormatError: not such an archive; with member or byte offset.
    """
    directory = _find_directory(data, where)
    members: dict[str, Member] = {}
    extents: list[tuple[int, int, str]] = []
    for entry in _iter_entries(data, directory, where):
        name = _text(entry.name, where)
        if name in members:
            _fault("member name occurs twice", f"{where}, member {_short(name)}")
        members[name] = member = _locate(data, entry, directory.offset, f"{where}, member {_short(name)}")
        extents.append((entry.header, member.offset + member.size, name))
    extents.sort()
    for (_, end, name), (start, _, other) in pairwise(extents):
        if start < end:
            _fault(f"members {_short(name)} and {_short(other)} overlap", f"{where}, byte {start}")
    return members


def _fault(what: str, where: object, *, expected: object = None, found: object = None, advice: str = "") -> NoReturn:
    raise FormatError(what, where=where, expected=expected, found=found, advice=advice or None)


def _short(name: str) -> str:
    return ascii(name[:80])


def is_plain_name(name: str) -> bool:
    """Whether a member's name stays inside the archive's folder wherever it might be unpacked."""
    parts = name.removesuffix("/").split("/")
    return not any(part in ("", ".", "..") for part in parts) and not any(letter in name for letter in "\\\0")


def _text(name: bytes, where: object) -> str:
    if len(name) > MAX_NAME_BYTES:
        _fault("member name too long", where, expected=f"<= {MAX_NAME_BYTES} bytes", found=len(name))
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("member name is not UTF-8", where=where, found=ascii(name[:80])) from error
    if not is_plain_name(text):
        _fault("member name is a path that leads elsewhere", where, found=_short(text))
    return text


def _unpack(form: struct.Struct, data: bytes | mmap, at: int, end: int, signature: bytes, where: object) -> list[int]:
    """The numbers of a record at byte `at` that must end by byte `end`, without its signature."""
    if at < 0 or at + form.size > end:
        _fault("zip record reaches outside its place", f"{where}, byte {at}", expected=f"{form.size} bytes by {end}")
    found, *numbers = form.unpack_from(data, at)
    if found != signature:
        _fault("no zip record where one must be", f"{where}, byte {at}", expected=signature, found=found)
    return numbers


def _find_directory(data: bytes | mmap, where: object) -> _Directory:
    end_at = len(data) - _END.size
    if end_at < 0 or data[end_at : end_at + 4] != b"PK\5\6":
        advice = "The file is cut short or has bytes appended: copy or download it again"
        _fault("no end record at the end of the zip archive", where, expected=f"at byte {end_at}", advice=advice)
    directory, tail_at = _plain_directory(data, end_at, where), end_at
    if data[max(end_at - _LOCATOR.size, 0) : end_at][:4] == b"PK\6\7":
        plain = directory
        directory, tail_at = _wide_directory(data, end_at - _LOCATOR.size, where)
        for small, large, full in zip(plain, directory, (_FULL16, _FULL32, _FULL32)):
            if small not in (large, full):
                _fault("zip64 and plain end records differ", f"{where}, byte {end_at}", expected=large, found=small)
    count, offset, size = directory
    if offset + size != tail_at:
        _fault("zip directory does not end at the end record", where, expected=tail_at, found=offset + size)
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        limits = f"<= {MAX_MEMBERS} members, {MAX_DIRECTORY_BYTES} bytes"
        _fault("zip directory too large", where, expected=limits, found=f"{count} members, {size} bytes")
    return directory


def _plain_directory(data: bytes | mmap, at: int, where: object) -> _Directory:
    disk, first, here, count, size, offset, comment = _unpack(_END, data, at, len(data), b"PK\5\6", where)
    if disk or first or comment or here != count:
        _fault("zip archive of several disks or with a comment", f"{where}, byte {at}")
    return _Directory(count, offset, size)


def _wide_directory(data: bytes | mmap, locator_at: int, where: object) -> tuple[_Directory, int]:
    disk, at, disks = _unpack(_LOCATOR, data, locator_at, len(data), b"PK\6\7", where)
    if at != locator_at - _END64.size:
        _fault("zip64 end record is not before its locator", where, expected=locator_at - _END64.size, found=at)
    numbers = _unpack(_END64, data, at, locator_at, b"PK\6\6", where)
    length, _, _, this, first, here, count, size, offset = numbers
    if length != _END64.size - 12 or disk or disks > 1 or this or first or here != count:
        _fault("zip64 end record of several disks or unknown length", f"{where}, byte {at}")
    return _Directory(count, offset, size), at


def _iter_entries(data: bytes | mmap, directory: _Directory, where: object) -> Iterator[_Entry]:
    at, end = directory.offset, directory.offset + directory.size
    for _ in range(directory.members):
        numbers = _unpack(_ENTRY, data, at, end, b"PK\1\2", where)
        _, _, flags, method, _, _, _, packed, size, names, extras, comments, disk, _, _, header = numbers
        name_at = at + _ENTRY.size
        extra_at = name_at + names
        place, at = f"{where}, directory byte {at}", extra_at + extras + comments
        if at > end:
            _fault("zip directory entry reaches outside the directory", place)
        sizes = _widen([size, packed, header], data[extra_at : extra_at + extras], place)
        if flags & ~_HARMLESS_FLAGS or disk:
            _fault("zip member is encrypted or of unknown form", place, found=f"flags {flags:#06x}")
        if method or sizes[0] != sizes[1]:
            advice = "torch.save stores members as they are; repack without compression, such as with zip -0"
            _fault("zip member is compressed", place, expected="method 0", found=f"method {method}", advice=advice)
        yield _Entry(data[name_at:extra_at], sizes[0], sizes[2])
    if at != end:
        _fault("zip directory holds more than its members", f"{where}, byte {at}")


def _widen(values: list[int], extra: bytes, place: str) -> list[int]:
    """Puts the 64-bit numbers of the zip64 extra field in the place of saturated ones."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if tag == 1:
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            widened = [next(wide, None) if value == _FULL32 else value for value in values]
            if None not in widened:
                return [value for value in widened if value is not None]
        at += 4 + length
    _fault("zip64 sizes are missing", place)


def _locate(data: bytes | mmap, entry: _Entry, end: int, place: str) -> Member:
    """The member's data, from its local header; everything before byte `end`, where the directory begins."""
    numbers = _unpack(_LOCAL, data, entry.header, end, b"PK\3\4", place)
    _, _, method, _, _, _, packed, size, names, extras = numbers
    name_at = entry.header + _LOCAL.size
    offset = name_at + names + extras
    if method or data[name_at : name_at + names] != entry.name:
        _fault("zip directory and local header differ", f"{place}, byte {entry.header}")
    if not {packed, size} <= {0, _FULL32, entry.size}:
        _fault("zip directory and local header differ", place, expected=f"{entry.size} bytes", found=size)
    if offset + entry.size > end:
        _fault("zip member reaches outside the file", place, expected=f"end by byte {end}", found=offset + entry.size)
    return Member(offset, entry.size)
