"""Training data from any data format and file form to any data format, each record proven to teach the same.

Every record written is read back, by its keys alone as training would, and must render to the same
text with the same trained spans. What a data format cannot say is refused with its line, and nothing is
written.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mlx_afm.data.config import DataConfig
from mlx_afm.data.data_format_writer import cannot_say, write_record
from mlx_afm.data.data_formats import DATA_FORMATS
from mlx_afm.data.records import Example, RecordReader, render_example
from mlx_afm.data.report import Problem, to_problems
from mlx_afm.data.rows import DataRow
from mlx_afm.data.sources import Files, iter_rows
from mlx_afm.data.split import require_other_files
from mlx_afm.errors import DataError, SettingError
from mlx_afm.files import atomic_file
from mlx_afm.text.messages import to_dict
from mlx_afm.tree import shorten

FLAT = ("prompt-completion", "prompt-response", "instruction", "text")  # fields are texts: they fit a table
TABLES = (".csv", ".tsv")


def convert_data(
    files: Files, target: Path, data_format: str, data_config: DataConfig | None = None, columns: Sequence[str] = ()
) -> int:
    """Writes the records of some files in a data format, and says how many.

    Args:
        files: from `find_splits`.
        target: `.jsonl`, `.ndjson`, `.json` (an array), `.csv` or `.tsv`.
        data_format: one of `DATA_FORMATS`.
        data_config: how to read. A transform is applied; the default system message is not written.
        columns: names of the columns of tables whose first line does not name them.

    Raises:
        DataError: faulty records, or what the data format cannot say: all lines in one error. Nothing was written.
        ConfigError: no such data format, one that is not flat for a table, a target that is a source, or columns
            for files that are no tables.
        FormatError: see `iter_rows`.
    """
    data_config = data_config or DataConfig()
    _require_target(files, target, data_format)
    _require_columns(files, columns)
    problems: list[Problem] = []
    with atomic_file(target) as partial:
        with partial.open("w", encoding="utf-8", newline="") as handle:
            in_table = target.suffix in TABLES
            records = _records(files, data_format, data_config, columns, problems, in_table=in_table)
            count = _WRITERS[target.suffix](handle, records, target)
        if problems or not count:
            raise _refusal(files, problems)
    return count


def _require_target(files: Files, target: Path, data_format: str) -> None:
    if data_format not in DATA_FORMATS:
        raise SettingError("no such data format", expected=f"one of {', '.join(DATA_FORMATS)}", found=data_format)
    if target.suffix in TABLES and data_format not in FLAT:
        advice = "Write .jsonl, or choose another data format."
        found = f"{data_format} for {target.name}"
        raise SettingError("a table holds flat records only", expected=", ".join(FLAT), found=found, advice=advice)
    if target.suffix not in _WRITERS or target.is_dir():
        raise SettingError("cannot write this", where=target, expected=f"a file {', '.join(_WRITERS)}")
    require_other_files(files, [target])


def _require_columns(files: Files, columns: Sequence[str]) -> None:
    if columns and any(file.suffix not in TABLES for file in files):
        raise SettingError("only tables have columns to name", where=files[0], expected=" or ".join(TABLES))
    if len(set(columns)) < len(columns) or not all(columns):
        raise SettingError("columns need names, each its own", found=", ".join(columns))


def _refusal(files: Files, problems: list[Problem]) -> DataError:
    if not problems:
        return DataError("no examples", kind="no-examples", where=files[0], expected="at least one record")
    lines = len({(problem.file, problem.line) for problem in problems})
    details = shorten(map(str, problems))
    what, advice = f"{lines} line(s) cannot be converted", "Nothing was written."
    return DataError(what, kind="faulty-lines", where=files[0], advice=advice, details=details)


def _records(
    files: Files,
    data_format: str,
    data_config: DataConfig,
    columns: Sequence[str],
    problems: list[Problem],
    *,
    in_table: bool,
) -> Iterator[Any]:
    """The records, as long as nothing is wrong; after that, what is wrong with the others."""
    read, index = RecordReader(data_config), 0
    for path in files:
        for row in iter_rows(path, columns):
            try:
                record = _rewritten(read(row, index, f"{path.name} line {row.line}"), data_format, in_table)
                if not problems:
                    yield record
            except DataError as error:
                problems += to_problems(error, str(path), row.line)
            index += 1


_READ_BACK = RecordReader(DataConfig())


def _rewritten(example: Example, data_format: str, in_table: bool) -> Any:
    """The record of an example; if it is to be a row of a table, its values are the texts of cells."""
    messages = [to_dict(message) for message in example.messages]
    record = write_record(messages, example.tools, example.text, data_format)
    if in_table:
        record = {name: value if isinstance(value, str) else _json(value) for name, value in record.items()}
    row = DataRow(1, _json(record).encode("utf-8"), in_table=in_table)
    try:
        same = render_example(_READ_BACK(row, 0, example.where)) == render_example(example)
    except DataError as error:
        raise cannot_say(data_format, f"read back it would be faulty ({error})") from error
    if not same:
        raise cannot_say(data_format, "read back it would be another conversation")
    return record


def _write_lines(handle: TextIO, records: Iterator[Any], target: Path) -> int:
    count = 0
    for record in records:
        handle.write(json.dumps(record, ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_array(handle: TextIO, records: Iterator[Any], target: Path) -> int:
    count = 0
    for record in records:
        handle.write(("[\n" if not count else ",\n") + json.dumps(record, ensure_ascii=False))
        count += 1
    handle.write("\n]\n" if count else "[]\n")
    return count


def _write_table(handle: TextIO, records: Iterator[Any], target: Path) -> int:
    """A table; it has the columns that any record has, so all of them are kept until the end."""
    rows = list(records)
    present = {name for row in rows for name in row}
    columns = [name for name in COLUMNS if name in present]
    csv_dialect = "excel-tab" if target.suffix == ".tsv" else "excel"
    writer = csv.DictWriter(handle, columns, dialect=csv_dialect, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row)
    return len(rows)


COLUMNS = ("system", "history", "instruction", "input", "output", "prompt", "completion", "response", "text", "tools")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_WRITERS: dict[str, Callable[[TextIO, Iterator[Any], Path], int]] = {
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".json": _write_array,
    ".csv": _write_table,
    ".tsv": _write_table,
}
