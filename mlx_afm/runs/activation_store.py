"""Activations of examples on disk, found again by the next run.

    FOLDER/NAME/about.json    what the activations are of, JSON; NAME is its SHA-256, shortened
    FOLDER/NAME/ID.values     records, one after the other; a writer has a file of its own
    FOLDER/NAME/ID.index      52 bytes for each, little-endian: key (32), offset (8), length (8), CRC-32 of it (4)

A record is a JSON line [[dtype, [length, ...]], ...] and then the bytes of the arrays in this order.

Several processes may read and write a store at the same time. A record that is not whole, because its writer was killed
or the disk failed, does not pass its CRC and counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.files import format_bytes, free_bytes, read_json, remove, size_of, to_json, write_json

STORES, ABOUT, VALUES, INDEX = "frozen", "about.json", ".values", ".index"
ENTRY = struct.Struct("<32sQQI")
RESERVE_BYTES = 2 << 30  # of the disk that stay free
CHECK_BYTES = 64 << 20  # written between two looks at the disk
REFRESH_SECONDS = 1.0  # between two looks at what other processes wrote

Array = npt.NDArray[Any]
OnNote = Callable[[str], None]


class DiskStore:
    """The store of what `about` describes; see `training.frozen.ActivationStore`.

    Args:
        folder: of all stores.
        about: everything that the activations depend on besides an example.
        limit_bytes: largest size of this store.
        on_note: told once, in a sentence, if the store takes no more.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], limit_bytes: int, on_note: OnNote) -> None:
        self.folder = folder / hashlib.sha256(to_json(dict(sorted(about.items()))).encode()).hexdigest()[:32]
        self.about, self.limit_bytes, self._on_note = about, limit_bytes, on_note
        self._entries: dict[bytes, tuple[int, int, int, int]] = {}  # key -> descriptor, offset, length, CRC
        self._segments: dict[str, tuple[int, int]] = {}  # name -> descriptor of the values, bytes of the index read
        self._writer: tuple[int, int] | None = None  # descriptors of values and index
        self._written = self._checked = self._refreshed = 0.0
        self._full = False
        self.size_bytes = sum(size_of(path) for path in self.folder.glob(f"*{VALUES}"))
        self._read_indexes()
        with suppress(OSError):
            os.utime(self.folder / ABOUT)  # it is used

    def __contains__(self, key: bytes) -> bool:
        """Whether the arrays of a key are there."""
        return key in self._entries

    def __len__(self) -> int:
        """How many examples are there."""
        return len(self._entries)

    def get(self, key: bytes) -> list[Array] | None:
        """The arrays of a key; None if they are not there, or damaged."""
        if key not in self._entries and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._read_indexes()
        if key not in self._entries:
            return None
        descriptor, offset, length, crc = self._entries[key]
        record = os.pread(descriptor, length, offset)
        if len(record) != length or zlib.crc32(record) != crc:
            del self._entries[key]
            return None
        return _parse(record)

    def put(self, key: bytes, arrays: Sequence[Array]) -> None:
        """Appends the arrays of a key, unless the store is full or the disk is."""
        record = _to_record(arrays)
        if self._full or not self._has_room(len(record)):
            return
        try:
            values, index = self._open()
            offset = os.lseek(values, 0, os.SEEK_END)
            _write(values, record)
            entry = offset, len(record), zlib.crc32(record)
            _write(index, ENTRY.pack(key, *entry))
        except OSError as error:
            self._stop(f"{os.strerror(error.errno or 0)}")
            return
        self._entries[key] = (values, *entry)
        self.size_bytes += len(record)
        self._written += len(record)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in {*(held for held, _ in self._segments.values()), *(self._writer or ())}:
            os.close(descriptor)
        self._segments, self._entries, self._writer = {}, {}, None

    def _has_room(self, size: int) -> bool:
        if self.size_bytes + size > self.limit_bytes:
            self._stop(f"it has its full size, {format_bytes(self.limit_bytes)}")
        elif self._writer is None or self._written - self._checked > CHECK_BYTES:
            self._checked = self._written
            if free_bytes(self.folder) < RESERVE_BYTES + size:
                self._stop(f"less than {format_bytes(RESERVE_BYTES)} of the disk are free")
        return not self._full

    def _stop(self, reason: str) -> None:
        self._full = True
        self._on_note(f"{self.folder}: no more activations are kept ({reason}); the others are computed in every epoch")

    def _open(self) -> tuple[int, int]:
        if self._writer is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.folder / ABOUT).is_file():
                write_json(self.folder / ABOUT, self.about)
            name = uuid.uuid4().hex[:12]
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._writer = (
                os.open(self.folder / f"{name}{VALUES}", flags, 0o644),
                os.open(self.folder / f"{name}{INDEX}", flags, 0o644),
            )
            self._segments[name] = (self._writer[0], 1 << 62)  # its entries are known
        return self._writer

    def _read_indexes(self) -> None:
        """Takes over the entries that were written since the last time, by whichever process."""
        self._refreshed = time.monotonic()
        for path in sorted(self.folder.glob(f"*{INDEX}")):
            name = path.name.removesuffix(INDEX)
            descriptor, known = self._segments.get(name, (-1, 0))
            if path.stat().st_size < known + ENTRY.size:
                continue
            if descriptor < 0:
                try:
                    descriptor = os.open(self.folder / f"{name}{VALUES}", os.O_RDONLY)
                except FileNotFoundError:
                    continue
            with path.open("rb") as handle:
                handle.seek(known)
                content = handle.read()
            whole = len(content) - len(content) % ENTRY.size
            for key, *entry in ENTRY.iter_unpack(content[:whole]):
                self._entries.setdefault(key, (descriptor, *entry))
            self._segments[name] = (descriptor, known + whole)


def _to_record(arrays: Sequence[Array]) -> bytes:
    head = to_json([[str(array.dtype), list(array.shape)] for array in arrays])
    return b"".join([head.encode(), b"\n", *(np.ascontiguousarray(array).tobytes() for array in arrays)])


def _parse(record: bytes) -> list[Array]:
    head, _, content = record.partition(b"\n")
    arrays, start = [], 0
    for dtype, shape in json.loads(head):
        array = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape)
        arrays.append(array)
        start += array.nbytes
    return arrays


def _write(descriptor: int, content: bytes) -> None:
    """Appends all of it, or nothing."""
    start = os.lseek(descriptor, 0, os.SEEK_END)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def list_stores(folder: Path) -> list[dict[str, Any]]:
    """Name, size in bytes, examples, time of last change and `about` of each store in a folder of stores."""
    found = []
    for store in sorted(path for path in folder.glob("*") if (path / ABOUT).is_file()):
        with suppress(FileNotFoundError):  # another process deletes it
            found.append(_listed(store))
    return found


def _listed(store: Path) -> dict[str, Any]:
    try:
        about = read_json(store / ABOUT)
    except FormatError:
        about = None
    sizes = {path: path.stat() for path in store.iterdir()}
    return {
        "name": store.name,
        "bytes": sum(facts.st_size for facts in sizes.values()),
        "examples": sum(facts.st_size // ENTRY.size for path, facts in sizes.items() if path.suffix == INDEX),
        "changed": max((facts.st_mtime for facts in sizes.values()), default=0.0),
        "about": about,
    }


def remove_unused_stores(folder: Path, days: float) -> None:
    """Deletes the stores that no run has opened or changed for so many days."""
    for store in list_stores(folder):
        if time.time() - store["changed"] > days * 86400:
            remove_store(folder, store["name"])


def remove_store(folder: Path, name: str) -> None:
    """Deletes a store; runs that use it go on and compute what they lack."""
    remove(folder / name)
