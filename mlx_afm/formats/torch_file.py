"""torch checkpoints (`.pt`): state dicts read through a memory map and written in one pass, without torch.

Byte layout: an uncompressed zip archive (`zip_reader`) of one folder, named after the file (`base-model/`) or
`archive/`, in torch's order:

    data.pkl                the state dict (`torch_pickle`); tensors are named by storage key
    .format_version "1"     .storage_alignment "64"     byteorder "little"
    data/0, data/1, ...     raw little-endian elements of each storage, at a multiple of 64
    version "3\\n"          .data/serialization_id, 40 digits that identify the contents

Reading needs `data.pkl` and the `data/` members it names; a `byteorder` other than little is refused, and so is a
`version` beyond `MAX_VERSION`. Other members are ignored.

Limits: those of `zip_reader`, `torch_opcodes` and `torch_pickle`. A storage must be exactly as large as the pickle
says. A tensor larger than its storage (strides of 0) may have up to `MAX_EXPANDED_BYTES`. Reading allocates less
than 64 MB, whatever the file holds.

Versions: the zip form, written by torch since 1.6. The legacy form (five pickles, then raw storages) and TorchScript
archives are recognised and refused.

What is written equals `torch.save` (2.15) of an OrderedDict of contiguous tensors byte for byte, except for the 40
digits of `.data/serialization_id`, which torch derives from its hash of the member names; see also
`pickle_state_dict`. For that the file name must be ASCII and no storage that begins beyond 4 GiB may itself have 4 GiB
(torch leaves one redundant field of its local header 0).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError, TensorsError
from mlx_afm.files import atomic_file
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor, OnBytes, ignore_bytes, told
from mlx_afm.formats.torch_names import MAX_DIMENSIONS, short
from mlx_afm.formats.torch_opcodes import MAX_PICKLE_BYTES, MAX_TEXT_BYTES
from mlx_afm.formats.torch_pickle import (
    MAX_TENSORS,
    TensorSpec,
    contiguous_strides,
    parse_state_dict,
    pickle_state_dict,
    shown,
)
from mlx_afm.formats.zip_reader import Member, read_members
from mlx_afm.formats.zip_writer import ZipWriter

MAX_VERSION = 10
MAX_EXPANDED_BYTES = 64 << 20
_ZIP_START = b"PK\3\4"
# Protocol 2, then the ten-byte integer 0x1950a86a20f9469cfc6c.
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, in the order of its state dict.

    Their arrays are read-only views of one memory map, which lives as long as any tensor or array does. Tensors
    that torch had tied are views of the same bytes. The file must not be shortened while it is in use.

    Raises:
        FormatError: not a file, not a checkpoint, or one that breaks the module's rules.

    Cost: the directory and `data.pkl`; values are read when touched.
    """
    data = _map(path)
    start = data[: len(_LEGACY_START)]
    if start.startswith(_ZIP_START):
        return _read_zip(data, path)
    if start == _LEGACY_START:
        raise FormatError(
            "a checkpoint in torch's legacy form, from before its zip files",
            where=path,
            expected="the zip form",
            advice="Re-save it: torch.save(torch.load(path, weights_only=True), new_path)",
        )
    raise FormatError("not a torch checkpoint", where=path, expected="a zip archive", found=f"bytes {start[:4].hex()}")


def _map(path: Path) -> mmap.mmap:
    try:
        if not path.is_file():
            raise FormatError("no such file", where=path)
        if not path.stat().st_size:
            raise FormatError("file is empty", where=path, expected="a torch checkpoint")
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"cannot be opened: {error.strerror}", where=path) from error


def _read_zip(data: mmap.mmap, path: Path) -> dict[str, LazyTensor]:
    members = _members_of_folder(data, path)
    _check_versions(data, members, path)
    pickled = members["data.pkl"]
    if pickled.size > MAX_PICKLE_BYTES:
        limit = f"<= {MAX_PICKLE_BYTES} bytes"
        raise FormatError("data.pkl is too large", where=path, expected=limit, found=pickled.size)
    specs = parse_state_dict(data[pickled.offset : pickled.offset + pickled.size], f"{path}, data.pkl")
    faults = [f"{short(name)}: {fault}" for name, spec in specs.items() if (fault := _storage_fault(spec, members))]
    if faults:
        raise FormatError("tensors without the bytes they need", where=path, details=shown(faults))
    return {
        name: LazyTensor(spec.dtype, spec.shape, partial(_view, data, members[f"data/{spec.storage_key}"], spec))
        for name, spec in specs.items()
    }


def _members_of_folder(data: mmap.mmap, path: Path) -> dict[str, Member]:
    """Members by their name inside the archive's one folder."""
    members = read_members(data, path)
    folders = {name.partition("/")[0] for name in members}
    if len(folders) != 1:
        raise FormatError("zip archive is not a torch checkpoint", where=path, expected="1 folder", found=len(folders))
    inside = {name.partition("/")[2]: member for name, member in members.items()}
    if "constants.pkl" in inside:
        advice = "Save the weights alone: torch.save(module.state_dict(), path)"
        raise FormatError("a TorchScript archive, which is a program", where=path, advice=advice)
    if "data.pkl" not in inside:
        raise FormatError("zip archive is not a torch checkpoint", where=path, expected="data.pkl in its folder")
    return inside


def _check_versions(data: mmap.mmap, members: dict[str, Member], path: Path) -> None:
    order = _small_text(data, members.get("byteorder"), "little")
    if order != "little":
        advice = "Re-save it on a little-endian machine"
        raise FormatError("byte order", where=f"{path}, byteorder", expected="little", found=order, advice=advice)
    version = _small_text(data, members.get("version"), "3")
    if version not in map(str, range(1, MAX_VERSION + 1)):
        raise FormatError("unknown version", where=f"{path}, version", expected=f"1 to {MAX_VERSION}", found=version)


def _small_text(data: mmap.mmap, member: Member | None, default: str) -> str:
    if member is None:
        return default
    text = data[member.offset : member.offset + min(member.size, 32)].decode("ascii", errors="backslashreplace")
    return ascii(text.rstrip("\n"))[1:-1]


def _storage_fault(spec: TensorSpec, members: dict[str, Member]) -> str | None:
    member = members.get(f"data/{spec.storage_key}")
    if member is None:
        return f"storage data/{spec.storage_key} is not in the file"
    if member.size != spec.storage_bytes:
        return f"storage data/{spec.storage_key} has {member.size} bytes instead of {spec.storage_bytes}"
    nbytes = spec.size * STORAGE_DTYPES[spec.dtype].itemsize
    if nbytes > max(member.size, MAX_EXPANDED_BYTES):
        return f"expands {member.size} bytes to {nbytes}"
    return None


def _view(data: mmap.mmap, member: Member, spec: TensorSpec) -> npt.NDArray[Any]:
    dtype = STORAGE_DTYPES[spec.dtype]
    if not spec.size:
        return np.empty(spec.shape, dtype)
    # NumPy wants strides to fit into 64 bits even where no step is ever taken.
    strides = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(spec.shape, spec.strides)]
    storage = memoryview(data)[member.offset : member.offset + member.size]
    return np.ndarray(spec.shape, dtype, buffer=storage, offset=spec.offset * dtype.itemsize, strides=strides)


def write_torch(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    aliases: Mapping[str, str] = _NO_ALIASES,
    on_bytes: OnBytes = ignore_bytes,
) -> None:
    """Writes a checkpoint that `torch.load(path, weights_only=True)` reads.

    Args:
        path: the file; its stem names the folder inside.
        tensors: by name, in the state dict's order. Each is read once, in order, and let go.
        aliases: further name -> name in `tensors`; both name one storage, as tied weights do. They come last.
        on_bytes: told how many bytes of values were just written.

    Raises:
        TensorsError: names or dtypes that the form cannot hold; `read` gave other than promised.

    Cost: one tensor in memory. The same input gives the same bytes.
    """
    _require_writable(path, tensors, aliases)
    specs = {name: _fresh_spec(str(key), tensor) for key, (name, tensor) in enumerate(tensors.items())}
    specs |= {alias: replace(specs[name]) for alias, name in aliases.items()}
    folder = path.stem if path.stem.isascii() else "archive"
    with atomic_file(path) as partial_path, partial_path.open("wb") as handle:
        archive = ZipWriter(handle)
        _add_bytes(archive, f"{folder}/data.pkl", pickle_state_dict(specs))
        _add_bytes(archive, f"{folder}/.format_version", b"1")
        _add_bytes(archive, f"{folder}/.storage_alignment", b"64")
        _add_bytes(archive, f"{folder}/byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors.items()):
            place = f"{path}, tensor {short(name)}"
            archive.add(f"{folder}/data/{key}", tensor.nbytes, told(tensor.iter_bytes(place), on_bytes))
        _add_bytes(archive, f"{folder}/version", b"3\n")
        _add_bytes(archive, f"{folder}/.data/serialization_id", _serialization_id(archive))
        archive.finish()


def _require_writable(path: Path, tensors: Mapping[str, LazyTensor], aliases: Mapping[str, str]) -> None:
    faults = [fault for name, tensor in tensors.items() if (fault := _name_fault(name) or _tensor_fault(name, tensor))]
    for alias, name in aliases.items():
        fault = _name_fault(alias)
        if not fault and alias in tensors:
            fault = f"{short(alias)}: an alias, but also a tensor"
        elif not fault and name not in tensors:
            fault = f"{short(alias)}: alias of {short(name)}, which is not there"
        faults += [fault] if fault else []
    if len(tensors) + len(aliases) > MAX_TENSORS:
        faults.append(f"{len(tensors) + len(aliases)} tensors, more than {MAX_TENSORS}")
    if faults:
        raise TensorsError("tensors that cannot be written", where=path, details=shown(faults))


def _name_fault(name: str) -> str | None:
    encoded = name.encode("utf-8", errors="surrogatepass")
    if len(encoded) > MAX_TEXT_BYTES or any("\ud800" <= letter <= "\udfff" for letter in name):
        return f"{short(name)}: name of more than {MAX_TEXT_BYTES} bytes, or not UTF-8"
    return None


def _tensor_fault(name: str, tensor: LazyTensor) -> str | None:
    if tensor.dtype not in STORAGE_DTYPES:
        return f"{short(name)}: dtype {tensor.dtype} is not supported"
    if len(tensor.shape) > MAX_DIMENSIONS:
        return f"{short(name)}: more than {MAX_DIMENSIONS} dimensions"
    return None


def _fresh_spec(key: str, tensor: LazyTensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tensor.shape, contiguous_strides(tensor.shape), 0, key, tensor.size)


def _add_bytes(archive: ZipWriter, name: str, content: bytes) -> None:
    archive.add(name, len(content), [content])


def _serialization_id(archive: ZipWriter) -> bytes:
    """Forty digits from names, sizes and CRCs of the members so far."""
    digest = hashlib.sha256(repr([tuple(member) for member in archive.members]).encode("ascii")).digest()
    return b"%040d" % (int.from_bytes(digest, "big") % 10**40)
