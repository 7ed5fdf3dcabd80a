"""Options of `mlx-afm convert` that say how to quantise; names are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

MODES = ("affine", "balanced", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("apple", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
NAMES = ("q_bits", "q_group_size", "q_mode", "q_recipe")

OPTIONS = (
    click.option("-q", "--quantize", is_flag=True, help="Put projections and embedding in codes."),
    click.option("--q-bits", type=int, help="Bits per code, 2 to 8; default: the mode's, 4 for affine."),
    click.option("--q-group-size", type=int, help="Weights that share a scale; default: the mode's, 64 for affine."),
    click.option(
        "--q-mode",
        type=click.Choice(MODES),
        help="Kind of codes, affine by default. balanced: 2 bits and one scale per output.",
    ),
    click.option(
        "--q-recipe",
        type=click.Choice(RECIPES),
        help="A mixture instead. apple: balanced projections, 4-bit embedding; mixed_L_H: L bits, H where it hurts.",
    ),
    click.option("-d", "--dequantize", is_flag=True, help="Make a quantised folder dense."),
)


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_quantization(options: dict[str, Any]) -> Any:
    """Takes the options out of a command's; gives a `QuantConfig`, or None without -q.

    Raises:
        UsageError: options of -q without it.
    """
    wanted = options.pop("quantize")
    values = {name.removeprefix("q_"): options.pop(name) for name in NAMES}
    given = [f"--q-{name.replace('_', '-')}" for name, value in values.items() if value is not None]
    if not wanted:
        if given:
            raise click.UsageError(f"{', '.join(given)} without -q")
        return None
    from mlx_afm.quant import QuantConfig

    return QuantConfig(**values)
