"""The zip form of torch's checkpoints: versions, pickle and places of the storages.

Byte layout: an uncompressed zip archive (`zip_reader`) of one folder, named after the file (`base-model/`) or
`archive/`, in torch's order:

    data.pkl                what was saved (`torch_opcodes`); tensors name their storage by key
    .format_version "1"     .storage_alignment "64"     byteorder "little"
    data/0, data/1, ...     raw little-endian elements of each storage, at a multiple of 64
    version "3\\n"          .data/serialization_id, 40 digits that identify the contents

Limits: those of `zip_reader` and `torch_opcodes`. Needed are `data.pkl` and the `data/` members it names; a
`byteorder` other than little is refused, other members are ignored.
Versions: `version` 1 to `MAX_VERSION`, or none. TorchScript archives are recognised and refused.
"""

from __future__ import annotations

from mmap import mmap
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_contents import Contents
from mlx_afm.formats.torch_opcodes import MAX_PICKLE_BYTES, parse_pickle
from mlx_afm.formats.zip_reader import Member, read_members

MAX_VERSION = 10


def read_zip(data: mmap, path: Path) -> Contents:
    """A mapped checkpoint of the zip form, taken apart.

    Raises:
        FormatError: one that breaks the module's rules.
    """
    members = _members_of_folder(data, path)
    _check_versions(data, members, path)
    pickled, where = members["data.pkl"], f"{path}, data.pkl"
    if pickled.size > MAX_PICKLE_BYTES:
        limit = f"<= {MAX_PICKLE_BYTES} bytes"
        raise FormatError("data.pkl is too large", where=path, expected=limit, found=pickled.size)
    value, end = parse_pickle(data[pickled.offset : pickled.offset + pickled.size], where)
    if end != pickled.size:
        raise FormatError("bytes after the end of the pickle", where=f"{where}, pickle byte {end}")
    storages = {name[5:]: member for name, member in members.items() if name.startswith("data/")}
    return Contents(value, where, storages)


def _members_of_folder(data: mmap, path: Path) -> dict[str, Member]:
    """Members by their name inside the archive's one folder."""
    members = read_members(data, path)
    folders = {name.partition("/")[0] for name in members}
    if len(folders) != 1:
        raise FormatError("zip archive is not a torch checkpoint", where=path, expected="1 folder", found=len(folders))
    # Long names would be held twice otherwise.
    inside = {name.partition("/")[2]: members.pop(name) for name in list(members)}
    if "constants.pkl" in inside:
        advice = "Save the weights alone: torch.save(module.state_dict(), path)"
        raise FormatError("a TorchScript archive, which is a program", where=path, advice=advice)
    if "data.pkl" not in inside:
        raise FormatError("zip archive is not a torch checkpoint", where=path, expected="data.pkl in its folder")
    return inside


def _check_versions(data: mmap, members: dict[str, Member], path: Path) -> None:
    order = _small_text(data, members.get("byteorder"), "little")
    if order != "little":
        advice = "Re-save it on a little-endian machine"
        raise FormatError("byte order", where=f"{path}, byteorder", expected="little", found=order, advice=advice)
    version = _small_text(data, members.get("version"), "3")
    if version not in map(str, range(1, MAX_VERSION + 1)):
        raise FormatError("unknown version", where=f"{path}, version", expected=f"1 to {MAX_VERSION}", found=version)


def _small_text(data: mmap, member: Member | None, default: str) -> str:
    if member is None:
        return default
    text = data[member.offset : member.offset + min(member.size, 32)].decode("ascii", errors="backslashreplace")
    return ascii(text.rstrip("\n"))[1:-1]
