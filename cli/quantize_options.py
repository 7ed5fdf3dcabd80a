"""Options of `mlx-afm convert` that say how to quantise; names are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MODES = ("affine", "balanced", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("apple", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
INITS = ("residual-svd", "weight-svd")
NAMES = ("q_bits", "q_group_size", "q_mode", "q_recipe")
INIT_NAMES = {"init_adapter": "init", "rank": "rank", "scale": "scale", "init_rounds": "rounds"}
CALIBRATION_NAMES = {"calibration_data": "data", "calibration_examples": "examples"}

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
    click.option(
        "--calibration-data",
        type=Path,
        help="With balanced codes: fit their scales to what the model reads in these examples.",
    ),
    click.option("--calibration-examples", type=int, help="So many of them.  [default: 128]"),
    click.option(
        "--init-adapter",
        type=click.Choice(INITS),
        help="Write a base adapter of the rounding's error, or of the weights before rounding.",
    ),
    click.option("--rank", type=int, help="Of that adapter.  [default: 32]"),
    click.option("--scale", type=float, help="Of that adapter; devices apply 0.5.  [default: 0.5]"),
    click.option("--init-rounds", type=int, help="Rounding and adapter in turn.  [default: 1]"),
    click.option("-d", "--dequantize", is_flag=True, help="Make a quantised folder dense."),
)


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_quantization(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the options out of a command's; gives the arguments of `convert` they mean, nothing without -q.

    Raises:
        UsageError: options of -q without it, or of an adapter or of calibration without that.
    """
    wanted = options.pop("quantize")
    values = {name.removeprefix("q_"): options.pop(name) for name in NAMES}
    init = _taken(options, INIT_NAMES, "init_adapter")
    calibration = _taken(options, CALIBRATION_NAMES, "calibration_data")
    given = [_flag(f"q_{name}") for name, value in values.items() if value is not None]
    given += [flag for flag, there in (("--init-adapter", init), ("--calibration-data", calibration)) if there]
    if not wanted:
        if given:
            raise click.UsageError(f"{', '.join(given)} without -q")
        return {}
    from mlx_afm.quant import QuantConfig
    from mlx_afm.quant.residual import InitConfig
    from mlx_afm.workflows.calibrate import Calibration

    arguments: dict[str, Any] = {"quantization": QuantConfig(**values)}
    if init:
        arguments["init_adapter"] = InitConfig(**init)
    if calibration:
        arguments["calibration"] = Calibration(**calibration)
    return arguments


def _taken(options: dict[str, Any], names: dict[str, str], first: str) -> dict[str, Any]:
    """The settings that were given, by their fields; without the first option there are none."""
    values = {name: options.pop(name) for name in names}
    given = {names[name]: value for name, value in values.items() if value is not None}
    if given and values[first] is None:
        alone = ", ".join(_flag(name) for name, value in values.items() if value is not None)
        raise click.UsageError(f"{alone} without {_flag(first)}")
    return given


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
