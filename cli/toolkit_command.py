"""`mlx-afm toolkit`: the commands of Apple's adapter training toolkit, by their names and options."""

from __future__ import annotations

import click

from . import (
    toolkit_draft_command,
    toolkit_export_command,
    toolkit_generate_command,
    toolkit_pack_command,
    toolkit_train_command,
)
from .parameters import example


@click.group("toolkit", epilog=example("mlx-afm toolkit generate --assets TOOLKIT/assets --prompt 'Write a title.'"))
def command() -> None:
    """Apple's adapter training toolkit, by its own commands and options.

    Where a script says `python -m examples.train_adapter` or `python -m export.export_fmadapter`, say
    `mlx-afm toolkit train_adapter` or `mlx-afm toolkit export_fmadapter`. The base model is converted once, into
    the user's cache folder, or into $MLX_AFM_TOOLKIT_CACHE.
    """


for script in (
    toolkit_train_command,
    toolkit_generate_command,
    toolkit_draft_command,
    toolkit_export_command,
    toolkit_pack_command,
):
    command.add_command(script.command)
