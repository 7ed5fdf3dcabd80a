"""Files of training data to rows of JSON text, whatever the file's form; and which files are which split.

A row is the JSON of one record and the line it stands in. JSON lines are passed on as they are;
records of other forms are written as JSON, so that there is one way from here on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_afm.data.rows import Row, csv_rows, dataset_rows, encoding_of, json_line_rows, json_rows, require_file
from mlx_afm.errors import DataError, FormatError
from mlx_afm.files import to_path

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Files = tuple[Path, ...]


def find_splits(data: str | Path) -> dict[str, Files]:
    """The files of each split; a single file is the one to train on.

    In a folder a split is a file `train.jsonl` (or another of `SUFFIXES`), pieces such as
    `train-00000-of-00002.parquet` there or in `data/`, or a data set's folder `train`.
    `validation`, `val` and `dev` are other names of `valid`.

    Raises:
        FormatError: nothing there, or two candidates for one split.
    """
    data = to_path(data)
    if data.is_file() or _is_saved_dataset(data):
        return {"train": (data,)}
    if not data.is_dir():
        raise FormatError("no such file or folder", where=data, expected="training data")
    found: dict[str, Files] = {}
    for split, names in NAMES.items():
        candidates = [files for name in names for files in _candidates(data, name)]
        if len(candidates) > 1:
            shown = ", ".join(files[0].name for files in candidates)
            raise FormatError(f"more than one {split} split", where=data, found=shown, advice="Keep one of them.")
        if candidates:
            found[split] = candidates[0]
    return found


def _candidates(folder: Path, name: str) -> Iterator[Files]:
    for suffix in SUFFIXES:
        if os.path.lexists(folder / f"{name}{suffix}"):  # whatever it is: reading it says if it is no file
            yield (folder / f"{name}{suffix}",)
        for place in (folder, folder / "data"):
            if pieces := sorted(place.glob(f"{name}-[0-9]*-of-[0-9]*{suffix}")):
                yield tuple(pieces)
    if _is_saved_dataset(folder / name):
        yield (folder / name,)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def is_json_lines(path: Path) -> bool:
    """Whether a file holds one record a line, as it is passed on."""
    return path.suffix not in (".json", ".csv", ".tsv", ".parquet") and not _is_saved_dataset(path)


def file_faults(path: Path) -> list[DataError]:
    """What is wrong with a file as a whole: a byte order mark, or another encoding than UTF-8."""
    encoding = encoding_of(path)
    if encoding == "utf-8-sig":
        advice = "Save the file as UTF-8 without it, or use data check --fix"
        return [DataError("the file begins with a byte order mark", kind="byte-order-mark", column=1, advice=advice)]
    if encoding != "utf-8":
        advice = "Save the file as UTF-8, or use data check --fix"
        facts: dict[str, Any] = {"expected": "UTF-8", "found": encoding.upper(), "advice": advice}
        return [DataError("wrong encoding", kind="wrong-encoding", column=1, **facts)]
    return []


def iter_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a file, one at a time; blank lines are skipped.

    A file in UTF-16 or with a byte order mark is read all the same: that it is so, `file_faults` says.

    Args:
        path: a file of any form, or a saved data set.
        columns: names of the columns of a table whose first line does not name them.

    Raises:
        FormatError: no such file, or a form we do not read.
        MissingDependencyError: a form that needs the `datasets` library.
    """
    if _is_saved_dataset(path):
        yield from dataset_rows(path)
        return
    require_file(path)
    if path.suffix == ".parquet":
        yield from dataset_rows(path)
        return
    with path.open("rb") as handle:
        if path.suffix in (".csv", ".tsv"):
            yield from csv_rows(handle, path, columns)
        elif path.suffix == ".json":
            yield from json_rows(handle, path)
        else:
            yield from json_line_rows(handle, path)
