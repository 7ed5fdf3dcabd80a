"""A copy of training data without its problems, and a word on every line that is not as it was.

Nothing is guessed: a line is copied byte for byte or left out. Left out are lines that training would
refuse, later copies of an example, and examples that a held-out split has too.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.data.check import HELD_OUT, OnProgress, ValidationResult, validate
from mlx_afm.data.config import DataConfig
from mlx_afm.data.records import as_json_line
from mlx_afm.data.repeats import find_duplicates, find_overlap
from mlx_afm.data.report import MAX_KEPT, DataReport
from mlx_afm.data.sources import SPLITS, Files, file_faults, is_json_lines, iter_rows
from mlx_afm.data.workers import to_tokenizer
from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.files import atomic_folder, to_path
from mlx_afm.folders import is_empty
from mlx_afm.text.tokenizer import AFMTokenizer

REASONS = {
    "duplicate": "left out: the same example stands before it",
    "overlap": "left out: a held-out split has this example too, and keeps it",
}


@dataclass(frozen=True)
class LineChange:
    """How one line of the copy differs from its source.

    Attributes:
        file: the source, as it was named by the caller.
        line: counted from 1; 1 also for what is about the whole file.
        kind: the sort of problem it answers.
        message: what was done.
    """

    file: str
    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class Fixed:
    """What `fix_data` did.

    Attributes:
        report: of the source.
        folder: the copy.
        files: the files written.
        changes: by file and line; at most `MAX_KEPT` of a kind.
        counts: how many changes there are of each kind.
    """

    report: DataReport
    folder: Path
    files: tuple[Path, ...]
    changes: tuple[LineChange, ...]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the report."""
        return {
            "folder": str(self.folder),
            "files": [str(path) for path in self.files],
            "counts": self.counts,
            "changes": [asdict(change) for change in self.changes],
        }


def fix_data(
    splits: dict[str, Files],
    folder: str | Path,
    config: DataConfig | None = None,
    tokenizer: AFMTokenizer | str | Path | None = None,
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Fixed:
    """Writes a copy that `check_data` finds no error in, as JSON lines, whole or not at all.

    Args:
        splits: from `find_splits`.
        folder: to be written; may exist if it is empty.
        config, tokenizer, workers, on_progress: see `check_data`.

    Raises:
        ConfigError: there is something in the folder already; or see `check_data`.
        FormatError: a file cannot be read.
        DataError: no example would remain.
    """
    folder = to_path(folder)
    tokenizer = None if tokenizer is None else to_tokenizer(tokenizer)
    if folder.exists() and not is_empty(folder):
        raise ConfigError("the folder for the fixed copy exists", where=folder, advice="Choose another, or remove it.")
    found = validate(splits, config, tokenizer, workers=workers, on_progress=on_progress)
    if found.unreadable:
        raise FormatError("cannot be read, so that there is no copy of it", where=sorted(found.unreadable)[0])
    copy = _Copy(found, (config or DataConfig()).fields)
    with atomic_folder(folder) as partial:
        written = [folder / name for name in copy.write_all(partial)]
        if not written:
            advice = "See what is wrong with the data without --fix."
            raise DataError(
                "no example would be left", kind="no-examples", where=next(iter(splits.values()))[0], advice=advice
            )
    counts = {kind: copy.counts[kind] for kind in sorted(copy.counts)}
    return Fixed(found.report, folder, tuple(written), tuple(copy.changes), counts)


class _Copy:
    """Writes the files one after the other and notes what changes."""

    def __init__(self, found: ValidationResult, fields: Sequence[tuple[str, str]]) -> None:
        self.found, self.fields = found, fields
        self.paths = [path for name in SPLITS for path in found.splits.get(name, ())]
        self.left_out = _left_out(found)
        self.changes: list[LineChange] = []
        self.counts: Counter[str] = Counter()

    def write_all(self, folder: Path) -> Iterator[str]:
        """Writes all files that keep an example; their names."""
        for number, path in enumerate(self.paths):
            name = path.name if is_json_lines(path) else f"{path.stem}.jsonl"
            if self._write(number, folder / name):
                yield name
            else:
                (folder / name).unlink()
                self._note(path, 1, "no-examples", "the file was left out: no example remains")

    def _write(self, number: int, target: Path) -> int:
        """How many records were written."""
        path, written, line = self.paths[number], 0, 0
        self._note_file(path)
        left_out = self.left_out[number]
        with target.open("wb") as handle:
            for row in iter_rows(path):
                for blank in range(line + 1, row.line if is_json_lines(path) else 0):
                    self._note(path, blank, "blank-line", "left out: a blank line")
                line = row.line
                kind = left_out.kind_at(line)
                if kind is None:
                    handle.write(as_json_line(row, self.fields) + b"\n")
                    written += 1
                else:
                    self._note(path, line, kind, REASONS.get(kind, f"left out: {kind}"))
        return written

    def _note(self, path: Path, line: int, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_KEPT:
            self.changes.append(LineChange(str(path), line, kind, message))

    def _note_file(self, path: Path) -> None:
        for fault in file_faults(path):
            done = (
                "the byte order mark was taken off" if fault.found is None else f"written as UTF-8, was {fault.found}"
            )
            self._note(path, 1, fault.kind, done)
        if not is_json_lines(path):
            self._note(path, 1, "other-form", "written as JSON lines, each record as it was")
        elif returns := _carriage_returns(path):
            self._note(path, 1, "carriage-return", f"{returns:,} lines ended with CR LF and now end with LF")


class _LeftOut:
    """Lines of one file that are not copied, asked for in order."""

    def __init__(self, lines: npt.NDArray[np.int64], kinds: npt.NDArray[np.uint16], names: list[str]) -> None:
        order = np.argsort(lines, kind="stable")
        self._lines, self._kinds, self._names, self._next = lines[order], kinds[order], names, 0

    def kind_at(self, line: int) -> str | None:
        """Why a line is left out; None if it is not."""
        self._next += int(np.searchsorted(self._lines[self._next :], line))
        if self._next == len(self._lines) or self._lines[self._next] != line:
            return None
        return self._names[int(self._kinds[self._next])]


def _left_out(found: ValidationResult) -> list[_LeftOut]:
    """The lines of each file that are not copied."""
    names = [*found.kinds, "duplicate", "overlap"]
    lines = [array("q", unused.lines) for unused in found.unused]
    kinds = [array("H", unused.kinds) for unused in found.unused]

    def add(places: list[tuple[int, int]], kind: str) -> None:
        for file, line in places:
            lines[file].append(line)
            kinds[file].append(names.index(kind))

    for prints in found.prints.values():
        for later, _ in find_duplicates(prints):
            add(prints.places(later), "duplicate")
    for held_out, other in HELD_OUT:
        if held_out in found.prints and other in found.prints:
            for examples, _ in find_overlap(found.prints[other], found.prints[held_out]):
                add(found.prints[other].places(examples), "overlap")
    return [_LeftOut(np.array(at, np.int64), np.array(why, np.uint16), names) for at, why in zip(lines, kinds)]


def _carriage_returns(path: Path) -> int:
    """How many lines of a file end with CR LF."""
    count, last = 0, b""
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            count += piece.count(b"\r\n") + (last == b"\r" and piece[:1] == b"\n")
            last = piece[-1:]
    return count
