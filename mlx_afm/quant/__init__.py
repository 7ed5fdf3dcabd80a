"""Quantized weights as numbers: the forms there are, which tensor takes which, and the balanced 2-bit set."""

from mlx_afm.quant.balanced import (
    Balanced,
    dequantize_balanced,
    pack_codes,
    quantize_balanced,
    unpack_codes,
)
from mlx_afm.quant.recipes import RECIPES, QuantConfig, QuantizationPlan, plan_schemes
from mlx_afm.quant.scheme import MODES, Scheme, parse_scheme

__all__ = [
    "MODES",
    "RECIPES",
    "Balanced",
    "QuantConfig",
    "QuantizationPlan",
    "Scheme",
    "dequantize_balanced",
    "pack_codes",
    "parse_scheme",
    "plan_schemes",
    "quantize_balanced",
    "unpack_codes",
]
