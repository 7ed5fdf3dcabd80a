"""Ways to spoil a package, each a function of its folder; some return the new path. Sizes do not matter."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_afm.formats.blob import Blob, read_blobs, write_blobs

WEIGHTS, METADATA, PROGRAM, DRAFT = "adapter_weights.bin", "metadata.json", "draft.mil", "draft_weights.bin"
SIGNATURE = "9799725ff8e851184037110b422d891ad3b92ec1"
NAN, INFINITY = b"\x00\x7e", b"\x00\x7c"

Spoil = Callable[[Path], Any]


# Metadata.


def metadata(**changes: Any) -> Spoil:
    """Sets keys (None removes one) and writes the canonical text."""

    def spoil(package: Path) -> None:
        content = {**json.loads((package / METADATA).read_bytes()), **changes}
        write_text(package, {key: value for key, value in content.items() if value is not None})

    return spoil


def write_text(package: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True, indent=4, ensure_ascii=False)
    (package / METADATA).write_bytes(text.encode("utf-8", "surrogatepass"))


def text(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(package: Path) -> None:
        path = package / METADATA
        path.write_bytes(change(path.read_bytes()))

    return spoil


# Containers.


@dataclass
class Part:
    """One record as it will be written; what is None is written as it should be.

    Attributes:
        gap: zero bytes between metadata block and payload.
        nbytes, sentinel, padding, reserved: fields of the metadata block.
        code, payload: type code, bytes.
        filler: the bytes between the payload and the next block are of this value.
    """

    payload: bytes
    code: int = 1
    gap: int = 0
    nbytes: int | None = None
    sentinel: int = 0xDEADBEEF
    padding: int = 0
    reserved: int = 0
    filler: int = 0


def write_parts(path: Path, parts: list[Part]) -> None:
    with path.open("wb") as out:
        out.write(struct.pack("<II56x", len(parts), 2))
        for index, part in enumerate(parts):
            size = len(part.payload) if part.nbytes is None else part.nbytes
            start = out.tell() + 64 + part.gap
            out.write(struct.pack("<IIQQQ31xB", part.sentinel, part.code, size, start, part.padding, part.reserved))
            out.write(bytes(part.gap) + part.payload)
            if index < len(parts) - 1:
                out.write(bytes([part.filler]) * (-out.tell() % 64))


def container(change: Callable[[list[Part]], Any], file: str = WEIGHTS) -> Spoil:
    """Writes a container again with other records."""

    def spoil(package: Path) -> None:
        parts = [Part(blob.read().tobytes(), blob.type_code) for blob in read_blobs(package / file)]
        changed = change(parts)
        write_parts(package / file, parts if changed is None else changed)

    return spoil


def part(index: int, **changes: Any) -> Callable[[list[Part]], None]:
    def change(parts: list[Part]) -> None:
        parts[index] = replace(parts[index], **changes)

    return change


def patch(offset: int, content: bytes | Callable[[bytes], bytes], file: str = WEIGHTS) -> Spoil:
    """Overwrites bytes; a function is given the bytes of the whole first block."""

    def spoil(package: Path) -> None:
        with (package / file).open("r+b") as handle:
            first = handle.read(64)
            handle.seek(offset)
            handle.write(content(first) if callable(content) else content)

    return spoil


def counted(more: int) -> Callable[[bytes], bytes]:
    return lambda first: struct.pack("<I", struct.unpack_from("<I", first)[0] + more)


def resized(change: Callable[[list[Blob]], int], file: str = WEIGHTS) -> Spoil:
    """Cuts a file, or makes it longer, to the size that its records give."""
    return lambda package: os.truncate(package / file, change(read_blobs(package / file)))


def end_of(blob: Blob) -> int:
    return blob.offset + blob.nbytes


def values(index: int, content: bytes) -> Spoil:
    def change(parts: list[Part]) -> None:
        parts[index].payload = content + parts[index].payload[len(content) :]

    return container(change)


def all_zero(parity: int) -> Spoil:
    def change(parts: list[Part]) -> None:
        for index in range(parity, len(parts), 2):
            parts[index].payload = bytes(len(parts[index].payload))

    return container(change)


def swap(first: int, second: int) -> Spoil:
    def change(parts: list[Part]) -> None:
        parts[first], parts[second] = parts[second], parts[first]

    return container(change)


# Files.


def extra(name: str, content: bytes = b"x") -> Spoil:
    def spoil(package: Path) -> None:
        (package / name).write_bytes(content)

    return spoil


def folder_for(name: str) -> Spoil:
    def spoil(package: Path) -> None:
        (package / name).unlink(missing_ok=True)
        (package / name).mkdir()

    return spoil


def remove(name: str) -> Spoil:
    return lambda package: (package / name).unlink()


def rename(name: str) -> Spoil:
    return lambda package: package.rename(package.with_name(name))


def file_instead(package: Path) -> None:
    shutil.rmtree(package)
    package.write_bytes(b"x")


def write_draft(package: Path) -> None:
    """A sound draft pair; the second payload is followed by padding."""
    (package / PROGRAM).write_bytes(b"program(1.0)")
    write_blobs(package / DRAFT, [np.arange(32, dtype=np.float16), np.ones(3, np.float16), np.ones(5, np.float16)])


def write_toolkit(folder: Path) -> Path:
    """The toolkit's files that a draft pair of `write_draft` comes from; other payloads."""
    write_draft(folder)
    (folder / DRAFT).rename(folder / "weights_template.bin")
    container(part(0, payload=bytes(64)), "weights_template.bin")(folder)
    return folder


def draft(*spoils: Spoil) -> Spoil:
    """Adds a sound draft pair and spoils it."""

    def spoil(package: Path) -> None:
        write_draft(package)
        for one in spoils:
            one(package)

    return spoil
