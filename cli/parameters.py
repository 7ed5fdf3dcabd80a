"""Types of options that several commands share: paths, adapters by name, sizes in bytes."""

from __future__ import annotations

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
