"""What can be wrong with training data."""

from __future__ import annotations

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
