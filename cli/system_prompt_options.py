"""The options of the system prompt, for every command that answers; `data_options` has the same for training data."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

TEXT = click.option(
    "--system-prompt",
    metavar="TEXT",
    help="For conversations without a system message; '' for no system turn.  "
    "[default: the one the adapter was trained with, else the model's own]",
)
NONE = click.option(
    "--no-system-prompt",
    is_flag=True,
    default=None,
    help="No system turn for conversations without a system message.",
)


def system_prompt_options(function: Command) -> Command:
    """The command gets both options, and in their place one argument, `system`: see `one_system_prompt`."""

    @wraps(function)
    def with_system(*args: Any, system_prompt: str | None, no_system_prompt: bool | None, **options: Any) -> Any:
        return function(*args, system=one_system_prompt(system_prompt, no_system_prompt), **options)

    command: Any = TEXT(NONE(with_system))
    return command  # type: ignore[no-any-return]


def one_system_prompt(text: str | None, none: bool | None) -> str | None:
    """What both options say: a text, "" for no system turn, or None if neither was given.

    Raises:
        UsageError: both were given, and they contradict each other.
    """
    if text and none:
        raise click.UsageError("--system-prompt TEXT and --no-system-prompt contradict each other; give one of them")
    return "" if none else text
