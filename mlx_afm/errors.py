"""Every error the library raises on purpose.

    AFMError
    ├── ConfigError (ValueError)        a model configuration or a setting
    │   ├── SettingError                a value that a setting does not take; the command line exits with 2
    │   └── DiskFullError (OSError)     a disk without room for what is written
    ├── FormatError (ValueError)        a file or folder that is not what its name says
    ├── TensorsError (ValueError)       tensors missing, surplus, of the wrong shape or not finite
    ├── DataError (ValueError)          a training record
    ├── AdapterError (ValueError)       an adapter that does not belong to this model
    ├── DistributedError (RuntimeError) the other processes of a run
    └── MissingDependencyError (ImportError)

A message always answers the same questions in the same order: where, what, expected, found, and
what to do about it. Several faults of one kind travel in one error, a line each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AFMError(Exception):
    """Base of the library's errors.

    Args:
        what: the fault, in one clause.
        where: file, tensor, line or offset it was found at.
        expected: what would have been right.
        found: what was there.
        advice: what the user can do about it.
        details: further faults of the same kind, shown a line each.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        advice: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        self.what, self.where, self.expected, self.found = what, where, expected, found
        self.advice, self.details = advice, tuple(details)
        super().__init__(self._message())

    def _message(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        facts = [("expected", self.expected), ("found", self.found)]
        known = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
        if known:
            text += f" ({known})"
        if self.advice:
            text += f". {self.advice}"
        return "\n".join([text, *(f"  {line}" for line in self.details)])


class ConfigError(AFMError, ValueError):
    """A model configuration or a setting that cannot be used."""


class SettingError(ConfigError):
    """A value that a setting does not take, or settings that exclude each other.

    The fault is in what the caller wrote, not in a file: the command line exits with 2, as for wrong usage.
    """


class DiskFullError(ConfigError, OSError):
    """A disk that has no room for what is to be written; nothing half-written is left."""


class FormatError(AFMError, ValueError):
    """A file or folder that is damaged, unsafe, or not of the form it claims."""


class TensorsError(AFMError, ValueError):
    """Tensors that are missing, surplus, of the wrong shape or not finite; all of them in one error."""


class DataError(AFMError, ValueError):
    """A training record that would teach something wrong or nothing.

    Args:
        what, facts: see `AFMError`.
        kind: short name of the sort of fault, such as `unknown-role`; what reports group by.
        column: place in the line, counted from 1, if it is known.
        faults: the single faults, if this error stands for several.
    """

    def __init__(
        self,
        what: str,
        *,
        kind: str = "wrong-record",
        column: int | None = None,
        faults: Sequence[DataError] = (),
        **facts: Any,
    ) -> None:
        self.kind, self.column = kind, column
        self.faults: tuple[DataError, ...] = tuple(single for fault in faults for single in fault.faults) or (self,)
        super().__init__(what, **facts)


class AdapterError(AFMError, ValueError):
    """An adapter that does not belong to this model or cannot be expressed in the wanted form."""


class DistributedError(AFMError, RuntimeError):
    """Another process of the run that was lost or cannot be reached."""


class MissingDependencyError(AFMError, ImportError):
    """An optional library that this operation needs and that is not installed."""
