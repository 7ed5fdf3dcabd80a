"""torch checkpoints (`.pt`): state dicts read through a memory map and written in one pass, without torch.

Byte layout: the zip form, written by torch since 1.6, or the legacy form (`torch_legacy`), told apart by
their first bytes. Either holds the state dict (`torch_pickle`), alone or under one key of a larger checkpoint
(`torch_pickle`), and the storages that its tensors are views of.

Limits: those of the modules above. A storage must be exactly as large as the pickle says. A tensor larger than its
storage (strides of 0) may have up to `MAX_EXPANDED_BYTES`. Reading allocates less than 64 MB, whatever the file holds.

Versions: both forms are read; the zip form is written. What is written equals `torch.save` (2.15) of an OrderedDict of
contiguous tensors byte for byte, except for the 40 digits of `.data/serialization_id`, which torch derives from its
hash of the member names; see also `pickle_state_dict`. For that the file name must be ASCII and no storage that begins
beyond 4 GiB may itself have 4 GiB (torch leaves one redundant field of its local header 0).

The zip form of torch's checkpoints: versions, pickle and places of the storages.

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

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError, TensorsError
from mlx_afm.files import WriteOut, atomic_file, map_file, require_not_lfs_pointer
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor, OnBytes, ignore_bytes, told
from mlx_afm.formats.torch_legacy import read_legacy
from mlx_afm.formats.torch_names import MAX_DIMENSIONS, short
from mlx_afm.formats.torch_opcodes import MAX_PICKLE_BYTES, MAX_TEXT_BYTES, parse_pickle
from mlx_afm.formats.torch_pickle import (
    MAX_TENSORS,
    Contents,
    TensorSpec,
    contiguous_strides,
    pickle_state_dict,
    shown,
    specs_of,
    unwrap,
)
from mlx_afm.formats.zip_reader import Member, is_plain_name, read_members
from mlx_afm.formats.zip_writer import ZipWriter

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


MAX_EXPANDED_BYTES = 64 << 20
_ZIP_START = b"PK\3\4"
_PICKLE_START = b"\x80"
_NO_ALIASES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class TorchFile:
    """A checkpoint that was read.

    Attributes:
        tensors: by name, in the order of the state dict.
        wrapper_key: key of the larger checkpoint that the state dict was under; None if it stood alone.
        form: which of torch's two file formats it has.
    """

    tensors: dict[str, LazyTensor]
    wrapper_key: str | None
    form: Literal["zip", "legacy"]


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, in the order of its state dict; see `read_torch_checkpoint`."""
    return read_torch_checkpoint(path).tensors


def read_torch_checkpoint(path: Path) -> TorchFile:
    """The tensors of a checkpoint, and how it holds them.

    Their arrays are read-only views of one memory map, which lives as long as any tensor or array does. Tensors
    that torch had tied are views of the same bytes. The file must not be shortened while it is in use.

    Raises:
        FormatError: not a file, not a checkpoint, or one that breaks the module's rules.

    Cost: the directory and the pickles; values are read when touched.
    """
    data = _map(path)
    form: Literal["zip", "legacy"]
    if data[:4] == _ZIP_START:
        form, contents = "zip", read_zip(data, path)
    elif data[:1] == _PICKLE_START:
        form, contents = "legacy", read_legacy(data, path)
    else:
        found = f"bytes {data[:4].hex()}"
        raise FormatError(
            "not a torch checkpoint", where=path, expected="a zip archive or torch's pickles", found=found
        )
    state, wrapper_key = unwrap(contents.value, contents.where)
    specs = specs_of(state, contents.where if wrapper_key is None else f"{contents.where}, {wrapper_key!r}")
    return TorchFile(_tensors(data, specs, contents.storages, path), wrapper_key, form)


def _map(path: Path) -> mmap:
    try:
        if not path.is_file():
            raise FormatError("no such file", where=path)
        if not path.stat().st_size:
            raise FormatError("file is empty", where=path, expected="a torch checkpoint")
        require_not_lfs_pointer(path)
        with path.open("rb") as handle:
            return map_file(handle)
    except OSError as error:
        raise FormatError(f"cannot be opened: {error.strerror}", where=path) from error


def _tensors(
    data: mmap, specs: dict[str, TensorSpec], storages: Mapping[str, Member], path: Path
) -> dict[str, LazyTensor]:
    faults = [f"{short(name)}: {fault}" for name, spec in specs.items() if (fault := _storage_fault(spec, storages))]
    if faults:
        raise FormatError("tensors without the bytes they need", where=path, details=shown(faults))
    return {
        name: LazyTensor(spec.dtype, spec.shape, partial(_view, data, storages[spec.storage_key], spec))
        for name, spec in specs.items()
    }


def _storage_fault(spec: TensorSpec, storages: Mapping[str, Member]) -> str | None:
    storage = storages.get(spec.storage_key)
    if storage is None:
        return f"storage {spec.storage_key} is not in the file"
    if storage.size != spec.storage_bytes:
        return f"storage {spec.storage_key} has {storage.size} bytes instead of {spec.storage_bytes}"
    nbytes = spec.size * STORAGE_DTYPES[spec.dtype].itemsize
    if nbytes > max(storage.size, MAX_EXPANDED_BYTES):
        return f"expands {storage.size} bytes to {nbytes}"
    return None


def _view(data: mmap, place: Member, spec: TensorSpec) -> npt.NDArray[Any]:
    dtype = STORAGE_DTYPES[spec.dtype]
    if not spec.size:
        return np.empty(spec.shape, dtype)
    # NumPy wants strides to fit into 64 bits even where no step is ever taken.
    strides = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(spec.shape, spec.strides)]
    storage = memoryview(data)[place.offset : place.offset + place.size]
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
    folder = path.stem if path.stem.isascii() and is_plain_name(path.stem) else "archive"
    wanted_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_file(path, wanted_bytes) as partial_path, partial_path.open("wb") as handle:
        archive, write_out = ZipWriter(handle), WriteOut(handle)
        _add_bytes(archive, f"{folder}/data.pkl", pickle_state_dict(specs))
        _add_bytes(archive, f"{folder}/.format_version", b"1")
        _add_bytes(archive, f"{folder}/.storage_alignment", b"64")
        _add_bytes(archive, f"{folder}/byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors.items()):
            place = f"{path}, tensor {short(name)}"
            archive.add(f"{folder}/data/{key}", tensor.nbytes, told(tensor.iter_bytes(place), on_bytes))
            write_out.add(tensor.nbytes)
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
