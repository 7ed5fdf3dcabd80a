"""The options of everything that reads training data: which data, and how. `DataConfig` has the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_afm.data.config import CONTEXT_TOKENS, TRUNCATIONS, DataConfig
from mlx_afm.data.data_formats import DATA_FORMATS

from .parameters import PATH
from .system_prompt_options import NONE, one_system_prompt

Command = TypeVar("Command", bound=Callable[..., Any])

# Option -> field of `DataConfig`.
FIELDS = {
    "data_format": "data_format",
    "field": "fields",
    "transform": "transform",
    "system_prompt": "system",
    "max_seq_length": "max_tokens",
    "truncation": "truncation",
}
OPTIONS = [
    click.option(
        "--data-format",
        type=click.Choice(["auto", *DATA_FORMATS]),
        help="Data format.  [default: auto, by the keys of each record]",
    ),
    click.option(
        "--field",
        multiple=True,
        metavar="NAME=COLUMN",
        help="Read the column COLUMN as the field NAME, such as prompt=question; may be repeated.",
    ),
    click.option(
        "--transform",
        metavar="MODULE:FUNCTION",
        help="Function that gets the messages and index of each conversation, and returns messages.",
    ),
    click.option(
        "--system-prompt",
        metavar="TEXT",
        help="For conversations without a system message; '' for no system turn.  [default: the model's own]",
    ),
    NONE,
    click.option("--max-seq-length", type=int, help=f"Longest example, in tokens.  [default: {CONTEXT_TOKENS}]"),
    click.option(
        "--truncation", type=click.Choice(TRUNCATIONS), help="What to do with a longer example.  [default: error]"
    ),
]

no_cache_option = click.option(
    "--no-cache",
    is_flag=True,
    default=None,
    help="Encode the data again and keep no copy. MLX_AFM_CACHE=off does the same for every command.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace files that are there already.")


def data_config_options(function: Command) -> Command:
    """The command gets the options above, and in their place one argument, `data_config`: a `DataConfig`."""
    return _read_by(function, [*FIELDS, "no_system_prompt"], len(OPTIONS))


def record_options(function: Command) -> Command:
    """The same without what is about tokens."""
    names = ["data_format", "field", "transform"]
    return _read_by(function, names, len(names))


def _read_by(function: Command, names: list[str], count: int) -> Command:
    @wraps(function)
    def with_data_config(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in names}
        return function(*args, data_config=data_config_from(given), **options)

    command: Any = with_data_config
    for option in reversed(OPTIONS[:count]):
        command = option(command)
    return command  # type: ignore[no-any-return]


def data_config_from(options: Mapping[str, Any]) -> DataConfig:
    """How to read, from options by their names; what is None or not there keeps its default.

    Raises:
        ConfigError: settings out of range. UsageError: a --field without a column, contradicting options.
    """
    text = one_system_prompt(options.get("system_prompt"), options.get("no_system_prompt"))
    options = {**options, "system_prompt": text}
    given = {name: options[name] for name in FIELDS if options.get(name) not in (None, (), [])}
    if "field" in given:
        given["field"] = tuple(_pair(text) for text in given["field"])
    return DataConfig(**{FIELDS[name]: value for name, value in given.items()})


def _pair(text: str) -> tuple[str, str]:
    name, _, column = text.partition("=")
    if not name or not column:
        raise click.UsageError(f"--field {text}: expected NAME=COLUMN, such as prompt=question")
    return name, column


def data_argument(function: Command) -> Command:
    """The command gets `data`, a path: an argument, or --data as in `lora`."""

    @wraps(function)
    def with_data(*args: Any, positional: Path | None, data: Path | None, **options: Any) -> Any:
        if (positional is None) == (data is None):
            raise click.UsageError("give the data once: a folder with train, valid and test files, or one file")
        return function(*args, data=positional or data, **options)

    option = click.option("--data", type=PATH, help="Another way to give DATA.")
    command: Any = click.argument("positional", type=PATH, required=False, metavar="[DATA]")(option(with_data))
    return command  # type: ignore[no-any-return]
