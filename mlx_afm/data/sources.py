"""Files of training data to rows of JSON text, whatever the file's form; and which files are which split.

A row is the JSON of one record and the line it stands in. JSON lines are passed on as they are;
records of other forms are written as JSON, so that there is one way from here on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_afm.data.rows import DataRow, csv_rows, dataset_rows, encoding_of, json_line_rows, json_rows, require_file
from mlx_afm.errors import DataError, FormatError
from mlx_afm.files import to_path, visible

SPLITS = ("train", "valid", "test")
NAMES = {
    "train": ("train", "training_data"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Files that look like data and are of no form that is read; and those of a data set's own description.
OTHER_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".arrow", ".txt", ".xlsx", ".db", ".yaml", ".yml")
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")

Files = tuple[Path, ...]


def find_splits(data: str | Path) -> dict[str, Files]:
    """The files of each split; a single file is the one to train on.

    In a folder a split is a file `train.jsonl` (or another of `SUFFIXES`), pieces such as
    `train-00000-of-00002.parquet` there or in `data/`, or a data set's folder `train`.
    `NAMES` has the other names of a split. Hidden files are none of them.

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


def require_splits(data: Path, *needed: str) -> dict[str, Files]:
    """The files of each split.

    Args:
        data: see `find_splits`.
        needed: splits that must be there; without any, there must be at least one.

    Raises:
        FormatError: no such data, or one of the splits is not there; with what lies there instead.
    """
    splits = find_splits(data)
    missing = [name for name in needed if name not in splits] if needed else [] if splits else list(SPLITS)
    if not missing:
        return splits
    wanted = [f"{name}.jsonl" for split in missing for name in NAMES[split]]
    expected = f"{' or '.join(wanted)} (or .json, .csv, .parquet, a saved data set)"
    others = [path.name for path in (visible(data.iterdir()) if data.is_dir() else [data])]
    found = ", ".join(others[:SHOWN_NAMES]) + (f" and {len(others) - SHOWN_NAMES} more" * (len(others) > SHOWN_NAMES))
    what = f"no {' and no '.join(needed)} split" if needed else "no training data in this folder"
    raise FormatError(what, where=data, expected=expected, found=found or "an empty folder")


def find_unread(data: Path, splits: Mapping[str, Files]) -> tuple[Path, ...]:
    """Files and data sets in a folder of data that belong to no split, so that nobody reads them.

    Args:
        data: see `find_splits`.
        splits: what it found there.
    """
    if not data.is_dir() or _is_saved_dataset(data):
        return ()
    read = {_identity(file) for files in splits.values() for file in files}
    places = [data, *([data / "data"] if (data / "data").is_dir() else [])]
    there = [path for place in places for path in visible(place.iterdir())]
    return tuple(path for path in there if _looks_like_data(path) and _identity(path) not in read)


def unread_text(unread: Sequence[Path]) -> str:
    """One sentence that names the files of `find_unread`, and what to do to have them read."""
    names = ", ".join(path.name for path in unread[:SHOWN_NAMES])
    more = f" and {len(unread) - SHOWN_NAMES} more" if len(unread) > SHOWN_NAMES else ""
    known = ", ".join(name for names in NAMES.values() for name in names)
    return f"not read: {names}{more} (the name of a file of data is one of {known}, and ends in {', '.join(SUFFIXES)})"


SHOWN_NAMES = 10


def _identity(path: Path) -> object:
    """What is the same for two names of one file: another case on some disks, or a link."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _looks_like_data(path: Path) -> bool:
    if path.is_dir():
        return _is_saved_dataset(path)
    return path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES) and path.name not in DESCRIPTIONS


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


def iter_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[DataRow]:
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
