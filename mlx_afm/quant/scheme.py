"""The forms a matrix can be quantized to, and what they take on disk.

affine      codes of 2 to 8 bits; per group of columns a scale and a bias: w = code * scale + bias
mxfp4, nvfp4, mxfp8     small floats with a shared exponent or scale per group
balanced    2-bit codes 0..3 for {-1.5, -0.5, 0.5, 1.5} times one float32 scale per row; the group size
            is what MLX's product is asked for and says nothing about the values

Codes of all forms are packed into uint32, lowest bits first: (O, N * bits / 32). Scales and biases are
(O, N / group size), of the model's dtype or, for the floats, uint8; of balanced (O,), float32.

Shape suffixes: O rows (outputs), N columns (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_afm.errors import ConfigError, SettingError

BALANCED = "balanced"
GROUP_SIZES = {"affine": (32, 64, 128), BALANCED: (32, 64, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}
BITS = {"affine": (2, 3, 4, 5, 6, 8), BALANCED: (2,), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
DEFAULTS = {"affine": (64, 4), BALANCED: (64, 2), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
MODES = tuple(DEFAULTS)
BYTES = {"uint32": 4, "uint8": 1, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one matrix is quantized; the names are mlx-lm's.

    Attributes:
        mode: affine, balanced, mxfp4, nvfp4 or mxfp8.
        bits: per code; None for the mode's own.
        group_size: columns that share a scale; None for the mode's own.

    Raises:
        ConfigError: a combination that MLX does not have.
    """

    mode: str = "affine"
    bits: int = None  # type: ignore[assignment]  # always a number afterwards
    group_size: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.mode not in DEFAULTS:
            raise SettingError("unknown quantization mode", expected=" or ".join(MODES), found=self.mode)
        group_size, bits = DEFAULTS[self.mode]
        object.__setattr__(self, "bits", bits if self.bits is None else self.bits)
        object.__setattr__(self, "group_size", group_size if self.group_size is None else self.group_size)
        faults = [
            f"{name}: mode {self.mode} has {' or '.join(map(str, choices))}, found {value!r}"
            for name, value, choices in (
                ("bits", self.bits, BITS[self.mode]),
                ("group_size", self.group_size, GROUP_SIZES[self.mode]),
            )
            if isinstance(value, bool) or value not in choices
        ]
        if faults:
            raise SettingError("quantization settings out of range", details=faults)

    def fits(self, columns: int) -> bool:
        """Whether a row of that many columns can be cut into groups."""
        return columns % self.group_size == 0

    def arrays(self, rows: int, columns: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, dtype and shape of the arrays of a matrix (O, N) of a model of `dtype`, in their order."""
        weight = ("uint32", (rows, columns * self.bits // 32))
        if self.mode == BALANCED:
            return {"weight": weight, "scales": ("float32", (rows,))}
        groups = (rows, columns // self.group_size)
        if self.mode == "affine":
            return {"weight": weight, "scales": (dtype, groups), "biases": (dtype, groups)}
        return {"weight": weight, "scales": ("uint8", groups)}

    def nbytes(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes of these arrays."""
        return sum(BYTES[kind] * prod(shape) for kind, shape in self.arrays(rows, columns, dtype).values())

    def to_dict(self) -> dict[str, Any]:
        """The entry of an MLX `config.json`, in mlx-lm's order."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit"


def parse_scheme(values: Any, *, where: object) -> Scheme:
    """The scheme in an entry of `config.json`; mlx-lm leaves the mode out of old affine ones.

    Raises:
        ConfigError: not an entry, or settings that MLX does not have.
    """
    if not isinstance(values, Mapping) or "bits" not in values or "group_size" not in values:
        raise ConfigError("not a quantization", where=where, expected="an object with group_size and bits")
    try:
        return Scheme(mode=values.get("mode", "affine"), bits=values["bits"], group_size=values["group_size"])
    except ConfigError as error:
        raise ConfigError(
            error.what, where=where, expected=error.expected, found=error.found, details=error.details
        ) from None
