"""The options of a draft model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .parameters import PATH

AUTO = "auto"


def _number(ctx: click.Context, parameter: click.Parameter, value: str) -> int | None:
    if value == AUTO:
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= 100:
        raise click.BadParameter(f"expected 1 to 100, or {AUTO}; found {value}")
    return int(value)


def speculation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command: `draft_model`, and `num_draft_tokens`, None for a number that adapts."""
    help_number = f"Tokens it proposes at a time; {AUTO} follows what is accepted and what steps take, down to none."
    options = (
        click.option("--draft-model", type=PATH, help="MLX folder of a draft model: same answers, in less time."),
        click.option("--num-draft-tokens", default="5", show_default=True, callback=_number, help=help_number),
    )
    for option in reversed(options):
        command = option(command)
    return command
