"""Random mutations of packages: bytes, lengths, keys, fields, values and files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np

from package_spoilers import (
    DRAFT,
    INFINITY,
    METADATA,
    NAN,
    PROGRAM,
    SIGNATURE,
    WEIGHTS,
    extra,
    folder_for,
    rename,
    text,
    write_draft,
    write_text,
)

TYPES_OF_VALUE = (None, 0, -1, 32, 2, 2.5, True, "", "x", SIGNATURE, "fmadapter-plain-9799725", [], {}, {"a": [1]})


def mutate(package: Path, rng: np.random.Generator) -> Path:
    """Changes a package at random, in one to three ways, and returns where it is then."""
    if rng.random() < 0.4:
        write_draft(package)
    for _ in range(int(rng.integers(1, 4))):
        kind = MUTATIONS[int(rng.choice(len(MUTATIONS), p=WEIGHTS_OF_MUTATIONS))]
        package = kind(package, rng) or package
    return package


def _some_file(package: Path, rng: np.random.Generator) -> Path | None:
    files = sorted(path for path in package.iterdir() if path.is_file())
    return files[int(rng.integers(len(files)))] if files else None


def flip_bytes(package: Path, rng: np.random.Generator) -> None:
    if (path := _some_file(package, rng)) is not None and path.stat().st_size:
        content = bytearray(path.read_bytes())
        # Half of the places are in the first records, where the structure is.
        limit = len(content) if rng.random() < 0.5 else min(len(content), 512)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(limit))] = int(rng.integers(256))
        path.write_bytes(content)


def change_length(package: Path, rng: np.random.Generator) -> None:
    if (path := _some_file(package, rng)) is not None:
        size = path.stat().st_size
        changes = (rng.integers(0, size + 1), size + rng.integers(-3, 4), size + rng.choice((-64, 64)))
        os.truncate(path, max(0, int(changes[int(rng.integers(3))])))


def insert_or_delete(package: Path, rng: np.random.Generator) -> None:
    if (path := _some_file(package, rng)) is not None:
        content, length = path.read_bytes(), int(rng.choice((1, 2, 64, 128)))
        place = int(rng.integers(len(content) + 1)) // length * length
        middle = rng.bytes(length) if rng.random() < 0.3 else bytes(length)
        path.write_bytes(
            content[:place] + (middle + content[place:] if rng.random() < 0.5 else content[place + length :])
        )


def change_key(package: Path, rng: np.random.Generator) -> None:
    try:
        content = json.loads((package / METADATA).read_bytes())
        key = str(rng.choice([*content, "zebra"]))
    except (OSError, ValueError, TypeError):
        return
    if rng.random() < 0.2:
        content.pop(key, None)
    else:
        content[key] = TYPES_OF_VALUE[int(rng.integers(len(TYPES_OF_VALUE)))]
    write_text(package, content)


def change_field(package: Path, rng: np.random.Generator) -> None:
    """Sets a field of a metadata block, or of the header, to something near what is there."""
    path = package / str(rng.choice([WEIGHTS, WEIGHTS, DRAFT]))
    content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    starts = [
        0,
        *(place for place in range(64, len(content) - 63, 64) if content[place : place + 4] == b"\xef\xbe\xad\xde"),
    ]
    start = starts[int(rng.integers(len(starts)))]
    offset, form = ((0, "<I"), (4, "<I"), (8, "<Q"), (16, "<Q"), (24, "<Q"), (32, "<Q"), (56, "<Q"))[
        int(rng.integers(7))
    ]
    if len(content) < start + 64:
        return
    (value,) = struct.unpack_from(form, content, start + offset)
    width = 8 * struct.calcsize(form)
    struct.pack_into(form, content, start + offset, (value + int(rng.choice((-64, -2, -1, 1, 2, 64, 128)))) % 2**width)
    path.write_bytes(content)


def change_value(package: Path, rng: np.random.Generator) -> None:
    path = package / WEIGHTS
    if path.is_file() and path.stat().st_size > 200:
        content = bytearray(path.read_bytes())
        place = int(rng.integers(64, len(content) // 2 - 1)) * 2
        content[place : place + 2] = (NAN, INFINITY, bytes(2), rng.bytes(2))[int(rng.integers(4))]
        path.write_bytes(content)


def change_files(package: Path, rng: np.random.Generator) -> Path | None:
    choice = int(rng.integers(5))
    if choice == 0 and (path := _some_file(package, rng)) is not None:
        path.unlink()
    elif choice == 1:
        extra(str(rng.choice([PROGRAM, DRAFT, "README", "weights.bin"])), rng.bytes(int(rng.integers(100))))(package)
    elif choice == 2 and (path := _some_file(package, rng)) is not None:
        other = package / str(rng.choice([METADATA, WEIGHTS, PROGRAM, DRAFT, "x"]))
        path.replace(other)
    elif choice == 3:
        return rename(str(rng.choice(["plain.fmadapter", "box.fmadapter", "plain", "plain.fmadapter.zip"])))(package)
    elif (path := _some_file(package, rng)) is not None:
        path.write_bytes(b"")
    return None


MUTATIONS = (flip_bytes, change_length, insert_or_delete, change_key, change_field, change_value, change_files)
WEIGHTS_OF_MUTATIONS = (0.2, 0.1, 0.1, 0.25, 0.15, 0.1, 0.1)


# Mutations of text that random bytes would hardly find.
def spell_not_a_number(package: Path, rng: np.random.Generator) -> None:
    text(lambda raw: raw.replace(b"{}", b'{"a": %s}' % rng.choice([b"NaN", b"Infinity", b"-Infinity"])))(package)


def spell_lone_surrogate(package: Path, rng: np.random.Generator) -> None:
    text(lambda raw: raw.replace(b"3P", b"\\ud8%02x" % int(rng.integers(256))))(package)


def put_folder_in_place(package: Path, rng: np.random.Generator) -> None:
    folder_for(str(rng.choice([METADATA, WEIGHTS])))(package)


KNOWN_GAPS = {"takes NaN": spell_not_a_number, "lone surrogate": spell_lone_surrogate, "folder": put_folder_in_place}
