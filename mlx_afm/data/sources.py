"""Files of training data to rows of JSON text, whatever the file's form; and which files are which split.

A row is the JSON of one record and the line it stands in. JSON lines are passed on as they are;
records of other forms are written as JSON, so that there is one way from here on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.errors import DataError, FormatError, MissingDependencyError

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_LINE_BYTES = 4 << 20  # no example of 4,096 tokens comes near; bounds what one line can take in memory

Files = tuple[Path, ...]


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        line: its line, counted from 1 (its number, in a form without lines).
        text: JSON in UTF-8; empty if there is a fault.
        fault: why there is no text.
    """

    line: int
    text: bytes
    fault: DataError | None = None


def find_splits(data: Path) -> dict[str, Files]:
    """The files of each split; a single file is the one to train on.

    In a folder a split is a file `train.jsonl` (or another of `SUFFIXES`), pieces such as
    `train-00000-of-00002.parquet` there or in `data/`, or a data set's folder `train`.
    `validation`, `val` and `dev` are other names of `valid`.

    Raises:
        FormatError: nothing there, or two candidates for one split.
    """
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
        if (folder / f"{name}{suffix}").is_file():
            yield (folder / f"{name}{suffix}",)
        for place in (folder, folder / "data"):
            if pieces := sorted(place.glob(f"{name}-[0-9]*-of-[0-9]*{suffix}")):
                yield tuple(pieces)
    if _is_saved_dataset(folder / name):
        yield (folder / name,)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def file_faults(path: Path) -> list[DataError]:
    """What is wrong with a file as a whole: a byte order mark, or another encoding than UTF-8."""
    encoding = _encoding(path)
    if encoding == "utf-8-sig":
        advice = "Save the file as UTF-8 without it, or use data check --fix"
        return [DataError("the file begins with a byte order mark", kind="byte-order-mark", column=1, advice=advice)]
    if encoding != "utf-8":
        advice = "Save the file as UTF-8, or use data check --fix"
        facts: dict[str, Any] = {"expected": "UTF-8", "found": encoding.upper(), "advice": advice}
        return [DataError("wrong encoding", kind="wrong-encoding", column=1, **facts)]
    return []


def iter_rows(path: Path) -> Iterator[Row]:
    """The records of a file, one at a time; blank lines are skipped.

    A file in UTF-16 or with a byte order mark is read all the same: that it is so, `file_faults` says.

    Raises:
        FormatError: no such file, or a form we do not read.
        MissingDependencyError: a form that needs the `datasets` library.
    """
    if path.suffix == ".parquet" or path.is_dir():
        yield from _rows_of(_dataset(path))
        return
    _require_file(path)
    reader = {".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}.get(path.suffix, _json_lines)
    with path.open("rb") as handle:
        yield from reader(handle, path)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FormatError("no such file", where=path, expected="training data")


def _encoding(path: Path) -> str:
    if path.is_dir():
        return "utf-8"
    _require_file(path)
    if path.suffix == ".parquet":
        return "utf-8"
    with path.open("rb") as handle:
        start = handle.read(4)
    if start.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"


def _json_lines(handle: BinaryIO, path: Path) -> Iterator[Row]:
    encoding = _encoding(path)
    lines = _bounded_lines(handle)
    if encoding == "utf-8-sig":
        handle.read(3)
    elif encoding != "utf-8":
        text = io.TextIOWrapper(handle, encoding, errors="replace", newline="\n")
        lines = (line.encode("utf-8", "replace") for line in text)
    for number, line in enumerate(lines, start=1):
        if isinstance(line, int):
            yield Row(number, b"", _huge(line))
        elif line.strip():
            yield Row(number, line.rstrip(b"\r\n"))


def _bounded_lines(handle: BinaryIO) -> Iterator[bytes | int]:
    """Lines; of a line longer than `MAX_LINE_BYTES` its size alone."""
    while line := handle.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        size = len(line)
        while line := handle.readline(MAX_LINE_BYTES):
            size += len(line)
            if line.endswith(b"\n"):
                break
        yield size


def _huge(size: int) -> DataError:
    expected = f"at most {MAX_LINE_BYTES:,} bytes"
    advice = "No example of 4,096 tokens is this long; is a line break missing?"
    return DataError("a huge line", kind="huge-line", expected=expected, found=f"{size:,} bytes", advice=advice)


def _json_rows(handle: BinaryIO, path: Path) -> Iterator[Row]:
    try:
        text = handle.read().decode(_encoding(path))
    except UnicodeDecodeError as error:
        yield Row(1, b"", not_utf8(error))
        return
    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        expected = "an array of records (one record a line is .jsonl)"
        yield Row(1, b"", DataError("not an array", kind="bad-json", expected=expected))
        return
    yield from _elements(text, start + 1)


def _elements(text: str, position: int) -> Iterator[Row]:
    """The elements of an array as they are spelled, each with its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        position = _after_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            place = getattr(error, "colno", None)
            line = getattr(error, "lineno", line)
            yield Row(line, b"", DataError(f"not JSON: {getattr(error, 'msg', error)}", kind="bad-json", column=place))
            return
        yield Row(line, text[position:end].replace("\n", " ").encode("utf-8", "surrogatepass"))
        position = _after_space(text, end)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield Row(line, b"", DataError("not JSON: expected a comma or ]", kind="bad-json"))
            return


def _after_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n", "\v"):
        position += 1
    return position


def _csv_rows(handle: BinaryIO, path: Path) -> Iterator[Row]:
    text = io.TextIOWrapper(handle, _encoding(path), newline="")
    reader = csv.DictReader(text, dialect="excel-tab" if path.suffix == ".tsv" else "excel", strict=True)
    before = csv.field_size_limit(MAX_LINE_BYTES)
    line = 1
    try:
        line = reader.line_num + 1 if reader.fieldnames else 1
        for record in reader:
            if None in record or None in record.values():
                expected = f"{len(reader.fieldnames or ())} columns, as the first line has"
                yield Row(line, b"", DataError("wrong number of columns", kind="wrong-columns", expected=expected))
            else:
                yield _row(line, record)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield Row(line, b"", not_utf8(error))
    except csv.Error as error:
        yield Row(line, b"", DataError(f"not CSV: {error}", kind="bad-csv"))
    finally:
        csv.field_size_limit(before)


def not_utf8(error: UnicodeDecodeError) -> DataError:
    """The fault of text that is not UTF-8."""
    column = len(error.object[: error.start].decode("utf-8", "replace")) + 1
    found = f"byte 0x{error.object[error.start]:02x}"
    advice = "Save the file as UTF-8."
    return DataError("not UTF-8 text", kind="not-utf8", column=column, found=found, advice=advice)


def _rows_of(records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records, start=1):
        yield _row(number, _without_nulls(record))


def _row(line: int, record: Any) -> Row:
    return Row(line, json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct every key; what a record does not have is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _dataset(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        advice = "pip install 'mlx-afm[data]'"
        raise MissingDependencyError("reading this needs the datasets library", where=path, advice=advice) from error
    try:
        if path.is_dir():
            rows: Iterable[dict[str, Any]] = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FormatError("the datasets library cannot read this", where=path, found=error) from error
