"""Types of options that several commands share: paths, adapters by name, sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mlx_afm.errors import SettingError
from mlx_afm.files import parse_bytes, to_path

# Options of version 0.1.0 that have other names now, without their dashes. YAML keys have underscores.
RENAMED = {"dialect": "data-format", "overflow": "truncation", "ladder": "reference-answers"}


def current_name(name: str) -> str:
    """The current name of an option, with a notice on stderr if `name` is an old one.

    It is click's `token_normalize_func`.
    """
    if name not in RENAMED:
        return name
    click.echo(f"mlx-afm: --{name} is now --{RENAMED[name]}; the old name still works", err=True)
    return RENAMED[name]


def example(line: str) -> str:
    """The end of a command's help: one command line as a user types it."""
    return f"\b\nExample:\n  {line}"


class PathType(click.ParamType):  # type: ignore[type-arg]
    """A path. `~` at its beginning is the home folder, also in `--option=~/file`, which no shell expands."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path that a text means."""
        try:
            return to_path(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


PATH = PathType()


def is_given(name: str) -> bool:
    """Whether the command line of the running command has an option, by the name of its argument."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(names: Iterable[str], reason: str) -> None:
    """Refuses options that would have no effect.

    Raises:
        UsageError: some of `names` are given; with all of them and the reason.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    if found := [flags[name] for name in names if is_given(name)]:
        raise click.UsageError(f"{', '.join(found)}: no effect {reason}")


def named_paths(texts: tuple[str, ...], option: str = "--adapter") -> dict[str, Path]:
    """The paths of options NAME=PATH by their names.

    Raises:
        UsageError: another form, a name that is there twice, or a path where nothing is.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise click.UsageError(f"{option}: expected NAME=PATH, found {text}")
        if name in paths:
            raise click.UsageError(f"{option}: {name} is there twice")
        paths[name] = to_path(path)
        if not paths[name].exists():
            raise click.UsageError(f"{option}: no such file or folder: {paths[name]}")
    return paths


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 16GB or 4096.

    Args:
        least: the smallest that is taken.
    """

    name = "size"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes that a text means."""
        try:
            size = value if isinstance(value, int) else parse_bytes(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)
        if size < self.least:
            self.fail(f"expected at least {self.least} byte, found {value}", param, ctx)
        return size


SIZE, SIZE_OR_NONE = SizeType(1), SizeType(0)
