"""The forms of files of records, each read into rows: JSON lines, a JSON array, a table, a data set."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from mlx_afm.errors import DataError, FormatError, MissingDependencyError

CHUNK_BYTES = 1 << 18  # read at once
MAX_LINE_BYTES = 4 << 20  # no example of 4,096 tokens comes near; bounds what one line can take in memory


class DataRow(NamedTuple):
    """One record of a file.

    Attributes:
        line: its line, counted from 1 (its number, in a form without lines).
        text: JSON in UTF-8; empty if there is a fault.
        fault: why there is no text.
        in_table: it is a row of a table, whose cells may hold lists as JSON text.
    """

    line: int
    text: bytes
    fault: DataError | None = None
    in_table: bool = False


def encoding_of(path: Path) -> str:
    """The encoding a file of text says it has; UTF-8 if it says nothing."""
    if path.is_dir():
        return "utf-8"
    require_file(path)
    if path.suffix == ".parquet":
        return "utf-8"
    with path.open("rb") as handle:
        start = handle.read(4)
    if start.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"


def require_file(path: Path) -> None:
    """Raises FormatError unless there is a file, which is no folder, pipe or device."""
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise FormatError(what, where=path, expected="training data")


def json_line_rows(handle: BinaryIO, path: Path) -> Iterator[DataRow]:
    """The records of a file that has one a line; blank lines are skipped.

    A file whose first record goes over several lines is one fault, not one a line.
    """
    lines = enumerate(_lines(handle, encoding_of(path)), start=1)
    filled = ((number, line) for number, line in lines if isinstance(line, int) or (line and not line.isspace()))
    start = list(islice(filled, 2))
    if (fault := _over_lines([line for _, line in start])) is not None:
        yield DataRow(start[0][0], b"", fault)
        return
    for number, line in chain(start, filled):
        yield DataRow(number, b"", _huge(line)) if isinstance(line, int) else DataRow(number, line.rstrip(b"\r"))


def _over_lines(lines: Sequence[bytes | int]) -> DataError | None:
    """The fault of a file that begins with these lines, if its first record does not end on the line it begins on."""
    if len(lines) < 2 or isinstance(lines[0], int) or isinstance(lines[1], int):
        return None
    first, second = lines[0].strip(), lines[1].strip()
    if not first.startswith((b"{", b"[")) or not first.endswith((b"{", b"[", b",")) or not second:
        return None
    if first == b"[":
        what, advice = "a JSON array over several lines", "Name the file .json, or write each record on one line"
    elif second.startswith(b'"' if first.endswith(b"{") else (b'"', b"{", b"[")) and not second.endswith((b"}", b"]")):
        what, advice = "a record over several lines", "Write each record on one line, such as with jq -c ."
    else:
        return None  # a damaged first line, perhaps: the second one looks whole
    return DataError(what, kind="over-lines", expected="one record a line in this form of file", advice=advice)


def _lines(handle: BinaryIO, encoding: str) -> Iterator[bytes | int]:
    """The lines of a file in UTF-8, without their ends; of one that is too long its size alone."""
    if encoding in ("utf-8", "utf-8-sig"):
        handle.read(3 if encoding == "utf-8-sig" else 0)
        yield from _bounded_lines(lambda: handle.read(CHUNK_BYTES))
        return
    with io.TextIOWrapper(handle, encoding, errors="replace", newline="\n") as text:
        yield from _bounded_lines(lambda: text.read(CHUNK_BYTES // 4).encode("utf-8", "replace"))


def _bounded_lines(read: Callable[[], bytes]) -> Iterator[bytes | int]:
    """Lines; of a line longer than `MAX_LINE_BYTES` its size alone. Holds no more than such a line and a chunk."""
    rest, lost = b"", 0
    while chunk := read():
        *lines, rest = (rest + chunk).split(b"\n")
        if lost and lines:
            yield lost + len(lines.pop(0)) + 1
            lost = 0
        for line in lines:
            yield line if len(line) <= MAX_LINE_BYTES else len(line) + 1
        if lost or len(rest) > MAX_LINE_BYTES:
            rest, lost = b"", lost + len(rest)
    if lost or rest:
        yield lost or rest


def _huge(size: int) -> DataError:
    expected = f"at most {MAX_LINE_BYTES:,} bytes"
    advice = "No example of 4,096 tokens is this long; is a line break missing?"
    return DataError("a huge line", kind="huge-line", expected=expected, found=f"{size:,} bytes", advice=advice)


def json_rows(handle: BinaryIO, path: Path) -> Iterator[DataRow]:
    """The records of a JSON array; if two stand on one line, their numbers in place of their lines."""
    raw = handle.read()
    try:
        text = raw.decode(encoding_of(path))
    except UnicodeDecodeError as error:
        yield DataRow(raw.count(b"\n", 0, error.start) + 1, b"", not_utf8(error))
        return
    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        expected = "an array of records (one record a line is .jsonl)"
        yield DataRow(1, b"", DataError("not an array", kind="bad-json", expected=expected))
        return
    elements = list(_elements(text, start + 1))
    lines = [line for line, _ in elements]
    if len(set(lines)) < len(lines):  # several on a line: then they are counted
        lines = list(range(1, len(lines) + 1))
    for line, (_, found) in zip(lines, elements):
        if isinstance(found, DataError):
            yield DataRow(line, b"", found)
        elif found.stop - found.start > MAX_LINE_BYTES:
            yield DataRow(line, b"", _huge(found.stop - found.start))
        else:
            yield DataRow(line, text[found].replace("\n", " ").encode("utf-8", "surrogatepass"))


def _elements(text: str, position: int) -> Iterator[tuple[int, slice | DataError]]:
    """The elements of an array as they are spelled, each with its line; or what ends it early."""
    decoder, line, counted, closing = json.JSONDecoder(), 1, 0, "]"
    while True:
        position = _after_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith(closing or "\0", position):
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield getattr(error, "lineno", line), _broken(error)
            return
        yield line, slice(position, end)
        position = _after_space(text, end)
        if not text.startswith((",", "]"), position):
            yield line + text.count("\n", counted, position), _broken(ValueError("expected a comma or ]"))
            return
        closing = "" if text[position] == "," else "]"
        position += text[position] == ","
    if _after_space(text, position + 1) < len(text):
        yield line, _broken(ValueError("something stands after the array"))


def _broken(error: ValueError | RecursionError) -> DataError:
    """Why the elements of an array end here."""
    kind = "nested-too-deeply" if isinstance(error, RecursionError) else "bad-json"
    what = (
        "JSON nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {getattr(error, 'msg', error)}"
    )
    advice = "What follows in this file could not be read"
    return DataError(what, kind=kind, column=getattr(error, "colno", None), advice=advice)


def _after_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def csv_rows(handle: BinaryIO, path: Path, columns: Sequence[str] = ()) -> Iterator[DataRow]:
    """The records of a table, named by its first line unless `columns` are given; each has the line it begins on.

    A first line that says what `columns` says is no record.
    """
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with io.TextIOWrapper(handle, encoding, errors=errors, newline="") as text:
            yield from _table_rows(text, "excel-tab" if path.suffix == ".tsv" else "excel", list(columns))
    finally:
        csv.field_size_limit(before)


def _table_rows(text: TextIO, dialect: str, columns: list[str]) -> Iterator[DataRow]:
    first = text.readline()
    if (fault := _separator_fault(first, dialect, columns)) is not None:
        yield DataRow(1, b"", fault)
        return
    reader = csv.reader(chain([first] if first else [], text), dialect=dialect, strict=True)
    line = 1
    try:
        for values in reader:
            fault = _csv_fault(values, columns)
            if fault is not None:
                yield DataRow(line, b"", fault)
            if not columns and values:
                columns = values
                if fault is not None:
                    return  # without names of columns there are no records
            elif values and fault is None and not (line == 1 and values == columns):
                yield _row(line, dict(zip(columns, values)))
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "What follows in this file could not be read"
        yield DataRow(line, b"", DataError(f"not CSV: {error}", kind="bad-csv", advice=advice))


def _separator_fault(first: str, dialect: str, columns: list[str]) -> DataError | None:
    """What is wrong with a first line of several columns that another character separates than the file's form says."""
    expected, others = ("\t", ",;|") if dialect == "excel-tab" else (",", ";\t|")
    bare = re.sub('"[^"]*"', "", first)
    used = [character for character in others if character in bare]
    if expected in bare or not used or len(columns) == 1:
        return None
    names = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
    form = ".csv" if expected == "," else ".tsv"
    return DataError(
        "the columns are separated by another character",
        kind="wrong-columns",
        expected=f"{names[expected]} in a {form} file",
        found=names[used[0]],
        advice="Save a table with tabs as .tsv and one with commas as .csv",
    )


def _csv_fault(values: list[str], columns: list[str]) -> DataError | None:
    """What is wrong with a record, or with the names of the columns if there are none yet."""
    for value in values:
        if not value.isascii() and (escaped := _ESCAPED.search(value)):
            found = f"byte 0x{ord(escaped.group()) - 0xDC00:02x}"
            return DataError("not UTF-8 text", kind="not-utf8", found=found, advice="Save the file as UTF-8")
    if not columns and len(set(values)) < len(values):
        twice = next(name for name in values if values.count(name) > 1)
        return DataError(f"two columns are named {twice!r}", kind="wrong-columns", advice="Give each its own name")
    if columns and values and len(values) != len(columns):
        expected, found = f"{len(columns)} columns, as the first line has", str(len(values))
        return DataError("wrong number of columns", kind="wrong-columns", expected=expected, found=found)
    return None


_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as "surrogateescape" reads them


def not_utf8(error: UnicodeDecodeError) -> DataError:
    """The fault of text that is not UTF-8."""
    column = len(error.object[: error.start].rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
    found = f"byte 0x{error.object[error.start]:02x}"
    advice = "Save the file as UTF-8"
    return DataError("not UTF-8 text", kind="not-utf8", column=column, found=found, advice=advice)


def dataset_rows(path: Path) -> Iterator[DataRow]:
    """The records of a Parquet file or a saved data set, counted from 1."""
    for number, record in enumerate(_dataset(path), start=1):
        yield _row(number, _without_nulls(record))


def _row(line: int, record: Any) -> DataRow:
    text = json.dumps(record, ensure_ascii=False, default=str)
    return DataRow(line, text.encode("utf-8", "surrogatepass"), in_table=True)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct every key; what a record does not have is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# What the library and Arrow raise for damaged files, whichever part of them it is.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)


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
    except (*_UNREADABLE, datasets.exceptions.DatasetsError) as error:
        raise FormatError("the datasets library cannot read this", where=path, found=error) from error
