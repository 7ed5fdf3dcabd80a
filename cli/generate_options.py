"""The options of everything that generates: how to pick tokens, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = [
    click.option("--max-tokens", "-m", type=int, default=256, show_default=True, help="Longest answer."),
    click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling."),
    click.option("--top-k", type=int, default=0, show_default=True, help="Only the K most likely tokens; 0 for all."),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Smallest probability to sample, relative to the most likely token.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Seed of the sampler; the same seed gives the same answer.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop the answer before this text; may be repeated."),
    click.option(
        "--kv-bits",
        type=click.Choice(["8"]),
        help="Keep keys and values in 8 bits: half the memory of 16 bits, the same answer.",
    ),
    click.option(
        "--prefill-step-size",
        type=int,
        default=2048,
        show_default=True,
        help="Prompt tokens computed at once; fewer need less memory.",
    ),
]
NAMES = ("max_tokens", "temp", "top_p", "top_k", "min_p", "seed", "stop", "kv_bits", "prefill_step_size")


def generate_options(function: Command) -> Command:
    """The command gets the options above, and in their place one argument, `config`: a `GenerateConfig`."""

    @wraps(function)
    def with_config(*args: Any, **options: Any) -> Any:
        from mlx_afm.generation import GenerateConfig

        given = {name: options.pop(name) for name in NAMES}
        given["kv_bits"] = None if given["kv_bits"] is None else int(given["kv_bits"])
        return function(*args, config=GenerateConfig(**given), **options)

    command: Any = with_config
    for option in reversed(OPTIONS):
        command = option(command)
    return command  # type: ignore[no-any-return]
