"""What commands share: JSON or lines on stdout, progress on stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

from mlx_afm.errors import DataError
from mlx_afm.files import DISK_FULL, to_json

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def note(text: str) -> None:
    """A line of progress, on stderr."""
    click.echo(text, err=True)


def describe_os_error(error: OSError) -> str:
    """An error of the operating system: the file if there is one, the reason, and what to do about a full disk."""
    text = error.strerror or str(error) or type(error).__name__
    if error.errno in DISK_FULL:
        text += ". Free some space, or choose a folder on another disk, and run the command again"
    if error.filename is None:
        return f"the operating system reports: {text}"
    return f"{error.filename}: {text}"


def resume_line() -> str:
    """The command line that goes on with the run this one began: the same, with --resume."""
    arguments = sys.argv[1:]
    return shlex.join(["mlx-afm", *arguments, *([] if "--resume" in arguments else ["--resume"])])


def read_stdin() -> str:
    """The text on stdin, UTF-8.

    Raises:
        DataError: other bytes.
    """
    try:
        return str(sys.stdin.buffer.read(), "utf-8")  # type: ignore[operator]
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=f"stdin, byte {error.start + 1}") from error


def show(values: Mapping[str, Any], as_json: bool) -> None:
    """Prints results: one JSON object, or a line per value."""
    if as_json:
        click.echo(to_json(values, default=str))
        return
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    return "none" if value is None else str(value)
