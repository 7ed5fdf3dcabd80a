"""Types of options that several commands share: paths, adapters by name, sizes in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mlx_afm.errors import SettingError
from mlx_afm.files import to_path


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
UNITS = ("", "K", "M", "G", "T")


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


def size_of(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Callback of an option that is a size: the bytes of 16GB, 16 GiB or a plain number, more than 0.

    Raises:
        BadParameter: something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise click.BadParameter(f"expected a size such as 16GB, found {text!r}")
    factor: int = (1024 if match[3] else 1000) ** UNITS.index(match[2].upper())
    size = round(float(match[1]) * factor)
    if size < 1:
        raise click.BadParameter(f"expected more than 0 bytes, found {text!r}")
    return size
