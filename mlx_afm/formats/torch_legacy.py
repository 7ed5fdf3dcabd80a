"""The legacy form of torch's checkpoints, from before its zip files: five pickles, then raw storages.

Byte layout, integers little-endian; pickles of protocol 2 by the rules of `torch_opcodes`:

    pickle    0x1950a86a20f9469cfc6c, torch's magic number
    pickle    1001, the protocol version
    pickle    {"protocol_version": 1001, "little_endian": True, "type_sizes": {...}}
    pickle    what was saved; persistent ids have a sixth element, None
    pickle    [key, ...] of the storages, decimal texts
    per key   number of elements i64, then the elements, with nothing between or behind

Elements of untyped storages are bytes. Storages begin wherever the one before ends, so arrays of them are usually not
aligned; NumPy and MLX read them all the same.

Limits: those of `torch_opcodes` for the fourth pickle, fewer for the others, so that together they cannot allocate more
than it could alone. The keys must be those that the fourth pickle names, each once; every
storage must have as many elements as named there; the last one must end with the file.
Versions: 1001, little-endian. Storages that are views of others (a sixth element; torch before 0.4) and the tar
archives of torch before 0.2 are refused.
"""

from __future__ import annotations

import struct
from mmap import mmap
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.formats.tensors import STORAGE_DTYPES
from mlx_afm.formats.torch_names import RawStorage, kind_of, short
from mlx_afm.formats.torch_opcodes import Limits, parse_pickle
from mlx_afm.formats.torch_pickle import Contents
from mlx_afm.formats.zip_reader import Member

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_SMALL = Limits(1024, 100)
_NUMEL = struct.Struct("<q")
# Complex storages may stand beside the state dict, whose own tensors `torch_pickle` checks.
_ITEM_BYTES = {**{name: dtype.itemsize for name, dtype in STORAGE_DTYPES.items()}, "complex64": 8, "complex128": 16}


def read_legacy(data: mmap, path: Path) -> Contents:
    """A mapped checkpoint of the legacy form, taken apart.

    Raises:
        FormatError: one that breaks the module's rules.
    """
    at = _read_header(data, path)
    where, named = f"{path}, saved object", dict[str, RawStorage]()
    value, at = parse_pickle(data, where, at, storages=named)
    # A key is a text of at most 20 digits that is stored in the memo: two opcodes, 30 bytes.
    limits = Limits(1024 + 40 * len(named), 100 + 3 * len(named))
    keys, at = parse_pickle(data, f"{path}, storage keys", at, limits=limits)
    return Contents(value, where, _places(data, at, _checked_keys(keys, named, path), path))


def _read_header(data: mmap, path: Path) -> int:
    """Where the fourth pickle begins."""
    magic, at = parse_pickle(data, f"{path}, magic number", 0, limits=_SMALL)
    if type(magic) is not int or magic != MAGIC:
        advice = "It is a bare pickle; save with torch.save"
        raise FormatError("not a torch checkpoint", where=path, expected="torch's magic number", advice=advice)
    version, at = parse_pickle(data, f"{path}, protocol version", at, limits=_SMALL)
    if type(version) is not int or version != PROTOCOL:
        found = version if type(version) is int else kind_of(version)
        raise FormatError("unknown version of the legacy form", where=path, expected=PROTOCOL, found=found)
    system, at = parse_pickle(data, f"{path}, system information", at, limits=_SMALL)
    if type(system) is not dict or system.get("protocol_version", PROTOCOL) != PROTOCOL:
        raise FormatError("unknown system information", where=path, expected=f"a dictionary of version {PROTOCOL}")
    if system.get("little_endian") is not True:
        advice = "Re-save it on a little-endian machine"
        raise FormatError("byte order", where=path, expected="little_endian True", advice=advice)
    return at


def _checked_keys(keys: object, named: dict[str, RawStorage], path: Path) -> list[RawStorage]:
    """The storages in the file's order."""
    where = f"{path}, storage keys"
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise FormatError("not a list of storage keys", where=where, found=kind_of(keys))
    if len(set(keys)) != len(keys):
        raise FormatError("storage key occurs twice", where=where)
    strays = sorted(named.keys() ^ set(keys))
    if strays:
        expected, found = f"{len(named)} keys, as the tensors name them", f"{len(keys)}, such as {short(strays[0])}"
        raise FormatError("storage keys and tensors differ", where=where, expected=expected, found=found)
    return [named[key] for key in keys]


def _places(data: mmap, at: int, storages: list[RawStorage], path: Path) -> dict[str, Member]:
    """Where the elements of each storage lie; the first storage begins at byte `at`."""
    places: dict[str, Member] = {}
    for storage in storages:
        where = f"{path}, storage {storage.key}, byte {at}"
        item_bytes = 1 if storage.dtype is None else _ITEM_BYTES.get(storage.dtype)
        if item_bytes is None:
            raise FormatError(f"storages of dtype {storage.dtype} are not supported", where=where)
        if at + _NUMEL.size > len(data):
            raise FormatError("file is cut short before a storage", where=where, found=f"{len(data)} bytes")
        (numel,) = _NUMEL.unpack_from(data, at)
        if numel != storage.numel or numel < 0:
            expected = f"{storage.numel} elements, as its tensors say"
            raise FormatError("storage of another size", where=where, expected=expected, found=numel)
        place = Member(at + _NUMEL.size, numel * item_bytes)
        at = place.offset + place.size
        if at > len(data):
            found = f"{len(data)} bytes"
            raise FormatError("storage reaches outside the file", where=where, expected=f"{at} bytes", found=found)
        places[storage.key] = place
    if at != len(data):
        raise FormatError("bytes after the last storage", where=f"{path}, byte {at}", found=f"{len(data) - at} bytes")
    return places
