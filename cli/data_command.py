"""`mlx-afm data`."""

from __future__ import annotations

import click

from .data_check_command import check
from .data_convert_command import convert
from .data_render_command import render
from .data_split_command import split
from .data_stats_command import stats
from .parameters import example


@click.group("data", epilog=example("mlx-afm data check my-data --model afm-mlx"))
def command() -> None:
    """Training data before training: check it, measure it, look at it, split it, rewrite it."""


for subcommand in (check, stats, render, split, convert):
    command.add_command(subcommand)
