"""Options of `mlx-afm convert` that say how to quantize; their names are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .parameters import PATH

MODES = ("affine", "balanced", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("apple", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
INITS = ("residual-svd", "weight-svd")
NAMES = ("q_bits", "q_group_size", "q_mode", "q_recipe")
INIT_NAMES = {"init_adapter": "init", "rank": "rank", "scale": "scale", "init_rounds": "rounds"}
CALIBRATION_NAMES = {"calibration_data": "data", "calibration_examples": "examples"}

OPTIONS = (
    click.option("-q", "--quantize", is_flag=True, help="Quantize projections and embedding."),
    click.option("--q-bits", type=int, help="Bits per weight, 2 to 8.  [default: 4 for affine]"),
    click.option("--q-group-size", type=int, help="Weights that share a scale.  [default: 64 for affine]"),
    click.option(
        "--q-mode",
        type=click.Choice(MODES),
        help="Quantization mode. balanced: 2 bits and one scale per output.  [default: affine]",
    ),
    click.option(
        "--q-recipe",
        type=click.Choice(RECIPES),
        help="Recipe instead of bits, group size and mode. apple: balanced projections, 4-bit embedding; mixed_L_H: "
        "L bits, H bits for the most sensitive layers.",
    ),
    click.option(
        "--calibration-data",
        type=PATH,
        help="For balanced: examples that the scales are fitted on.",
    ),
    click.option("--calibration-examples", type=int, help="Number of these examples.  [default: 128]"),
    click.option(
        "--init-adapter",
        type=click.Choice(INITS),
        help="Write a base adapter that corrects part of the rounding error: from the error, or from the weights.",
    ),
    click.option("--rank", type=int, help="Rank of the base adapter.  [default: 32]"),
    click.option("--scale", type=float, help="Scale of the base adapter; devices apply 0.5.  [default: 0.5]"),
    click.option(
        "--init-rounds", type=int, help="Rounds of fitting the weights and the base adapter in turn.  [default: 1]"
    ),
    click.option("-d", "--dequantize", is_flag=True, help="Make a quantized folder dense."),
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
