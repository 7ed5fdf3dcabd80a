"""What a check of training data gives back: problems, counts, and the verdict that follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_afm.errors import DataError

# What training does not refuse; every other kind is an error.
WARNINGS = (
    "duplicate",
    "newline-mark",
    "replacement-character",
    "empty-prompt",
    "unknown-token",
    "arguments-not-json",
    "other-template",
)

MAX_MESSAGE = 1000  # characters


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one line.

    Attributes:
        file: as it was named by the caller.
        line: counted from 1.
        kind: short name of the sort of problem.
        message: what, expected, found, what to do.
        column: counted from 1, where it is known.
    """

    file: str
    line: int
    kind: str
    message: str
    column: int | None = None

    @property
    def is_error(self) -> bool:
        """Whether training would be wrong, so that it is refused."""
        return self.kind not in WARNINGS

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "severity": "error" if self.is_error else "warning"}

    def __str__(self) -> str:
        column = "" if self.column is None else f", column {self.column}"
        return f"{Path(self.file).name} line {self.line}{column}: {self.message}"


def to_problems(error: DataError, file: str, line: int) -> list[Problem]:
    """The single faults of an error."""
    return [Problem(file, line, fault.kind, _printable(str(fault)), fault.column) for fault in error.faults]


def _printable(message: str) -> str:
    """A message may quote the record: it is kept short, and can be written to any stream in UTF-8."""
    message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
    return message.encode("utf-8", "backslashreplace").decode()


MAX_KEPT = 10_000  # problems of one kind that are kept; the rest is counted


@dataclass(frozen=True)
class CheckedFile:
    """What one file holds.

    Attributes:
        file: as it was named by the caller.
        split: which split it belongs to.
        records: how many there are.
        examples: good ones, that training would see.
        tokens, trained_tokens: of them; 0 without a tokenizer.
        dropped: examples that were too long and are left out.
        shortened: examples that were too long and are cut.
        removed_tokens: tokens that both lose.
    """

    file: str
    split: str
    records: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    shortened: int = 0
    removed_tokens: int = 0


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found.

    Attributes:
        files: in the order they were read.
        problems: by file and line; at most `MAX_KEPT` of one kind.
        counts: how many problems there are of each kind, those not kept included.
        lengths_checked: whether there was a tokenizer, without which lengths and the special tokens
            that only it knows are not checked.
        max_tokens: the longest example allowed.
        unread_files: what else lies in the folder and looks like data.
    """

    files: tuple[CheckedFile, ...]
    problems: tuple[Problem, ...]
    counts: dict[str, int]
    lengths_checked: bool
    max_tokens: int
    unread_files: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if training would take the data as it is; there may be warnings."""
        return set(self.counts) <= set(WARNINGS)

    @property
    def errors(self) -> int:
        """How many problems are errors."""
        return sum(count for kind, count in self.counts.items() if kind not in WARNINGS)

    @property
    def warnings(self) -> int:
        """How many are not."""
        return sum(self.counts.values()) - self.errors

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        totals = ("records", "examples", "tokens", "trained_tokens")
        return {
            "ok": self.ok,
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": self.counts,
            "problems": [problem.to_dict() for problem in self.problems],
            "problems_left_out": sum(self.counts.values()) - len(self.problems),
            **{name: sum(getattr(file, name) for file in self.files) for name in totals},
            "files": [asdict(file) for file in self.files],
            "unread_files": list(self.unread_files),
            "lengths_checked": self.lengths_checked,
            "max_tokens": self.max_tokens,
        }


class ProblemList:
    """Problems as they are found: all counted, the first of each kind kept."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kept: list[Problem] = []

    def add(self, problems: Iterable[Problem]) -> None:
        """Takes some."""
        for problem in problems:
            self.counts[problem.kind] += 1
            if self.counts[problem.kind] <= MAX_KEPT:
                self.kept.append(problem)

    def room(self, kind: str) -> int:
        """How many more of a kind would be kept."""
        return max(0, MAX_KEPT - self.counts[kind])

    def sorted(self, order: dict[str, int]) -> tuple[Problem, ...]:
        """Those kept, by file in the order given, then by line and column."""
        return tuple(sorted(self.kept, key=lambda p: (order[p.file], p.line, p.column or 0)))
