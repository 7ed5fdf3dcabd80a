"""The balanced 2-bit set: weights from {-1.5, -0.5, 0.5, 1.5} * s, one scale s per row.

Code q in 0..3 stands for q - 1.5. Sixteen codes make a uint32, lowest bits first, which is MLX's affine
2-bit packing; with scale 1 and bias -1.5 its product is exact, and s multiplies the output. MLX's own
quantizer is never used: it moves weights that lie on this grid by up to 0.75 s.

Shape suffixes: O rows (outputs), N columns (inputs), W words of sixteen codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import ConfigError

CODES_PER_WORD = 16
SHIFTS = np.arange(0, 32, 2, dtype=np.uint32)
PIECE_VALUES = 1 << 20  # of a matrix, sorted at a time
LOOKED_AT = 64  # columns that tell most rows off a grid

Floats = npt.NDArray[np.float32]
# Storage dtype -> bits of the fraction.
FRACTION_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


@dataclass(frozen=True)
class Balanced:
    """A quantized matrix.

    Attributes:
        codes_ON: uint8, 0 to 3.
        scales_O: float32; zero for a row of zeros.
        exact_O: bool, rows whose every value comes back bit for bit.
    """

    codes_ON: npt.NDArray[np.uint8]
    scales_O: Floats
    exact_O: npt.NDArray[np.bool_]


def quantize_balanced(
    weight_ON: Floats,
    *,
    dtype: str = "float32",
    column_weights_N: npt.NDArray[Any] | None = None,
    per_tensor: bool = False,
) -> Balanced:
    """The nearest matrix on the grid; rows that lie on a grid already are kept exactly.

    Args:
        weight_ON: the values, widened to float32 if they are stored in 16 bits.
        dtype: what they are stored in: a value on the grid is s * code rounded once to that.
        column_weights_N: how much an error in each column counts, such as the mean square of that input
            over calibration data; None counts all alike.
        per_tensor: one scale for all rows that are not on a grid of their own.

    Raises:
        ConfigError: values that are not finite, or column weights that are negative or all zero.

    Example: a row `3 -1 1 -3` has s = 2 and codes `3 1 2 0`.
    """
    if not np.isfinite(weight_ON).all():
        raise ConfigError("weights that are not finite cannot be quantized")
    scales_O, exact_O = grid_scales(weight_ON, dtype)
    loose_O = ~exact_O
    if loose_O.any():
        rows = weight_ON if loose_O.all() else weight_ON[loose_O]
        scales_O[loose_O] = fit_scales(rows, column_weights_N, per_tensor=per_tensor)
    return Balanced(codes_of(weight_ON, scales_O), scales_O, exact_O)


def grid_scales(weight_ON: Floats, dtype: str = "float32") -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Scales (O,) of the rows that lie on a grid, and which rows these are; others have scale 0.

    A row has at most two magnitudes a <= b then, with a = round(0.5 s) and b = round(1.5 s). Usually
    s = 2 a exactly. In 16 bits s may have had more digits than a kept: then any s that rounds to both
    serves, and the one nearest to b / 1.5 is taken. A row of one magnitude has codes +-0.5.
    """
    scales_O, exact_O = np.zeros(len(weight_ON), np.float32), np.zeros(len(weight_ON), np.bool_)
    likely_O = _two_magnitudes(np.abs(weight_ON[:, :LOOKED_AT]))[0]  # nearly all others fall out here
    if likely_O.any():
        magnitudes_ON = np.abs(weight_ON if likely_O.all() else weight_ON[likely_O])
        scales_O[likely_O], exact_O[likely_O] = _grid_of(magnitudes_ON, dtype)
    return scales_O, exact_O


def _two_magnitudes(magnitudes_ON: Floats) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Which rows have two values at most, and the least and greatest of each row."""
    low_O, high_O = magnitudes_ON.min(axis=1), magnitudes_ON.max(axis=1)
    two_O = ((magnitudes_ON == low_O[:, None]) | (magnitudes_ON == high_O[:, None])).all(axis=1)
    return two_O, low_O, high_O


def _grid_of(magnitudes_ON: Floats, dtype: str) -> tuple[Floats, npt.NDArray[np.bool_]]:
    two_O, low_O, high_O = _two_magnitudes(magnitudes_ON)
    scales_O = np.float32(2) * low_O
    exact_O = two_O & _gives(scales_O, low_O, high_O, dtype)
    if dtype != "float32":
        other_O = _scale_between(low_O, high_O, dtype)
        found_O = two_O & ~exact_O & (low_O > 0) & _gives(other_O, low_O, high_O, dtype)
        scales_O, exact_O = np.where(found_O, other_O, scales_O), exact_O | found_O
    return np.where(exact_O, scales_O, np.float32(0)), exact_O


def _gives(scales_O: Floats, low_O: Floats, high_O: Floats, dtype: str) -> npt.NDArray[np.bool_]:
    small = rounded(np.float32(0.5) * scales_O, dtype) == low_O
    large = rounded(np.float32(1.5) * scales_O, dtype) == high_O
    gives: npt.NDArray[np.bool_] = small & (large | (low_O == high_O))
    return gives


def _scale_between(low_O: Floats, high_O: Floats, dtype: str) -> Floats:
    """The scale nearest to 2/3 of the larger magnitude whose half still rounds to the smaller one."""
    wide = low_O.astype(np.float64)
    _, exponent = np.frexp(wide)
    reach = 0.499 * np.ldexp(1.0, exponent - 1 - FRACTION_BITS[dtype])
    nearest = np.clip(high_O.astype(np.float64) / 1.5, 2 * (wide - reach), 2 * (wide + reach))
    return nearest.astype(np.float32)


def fit_scales(
    weight_ON: Floats, column_weights_N: npt.NDArray[Any] | None = None, *, per_tensor: bool = False
) -> Floats:
    """Scales (O,) of least mean squared error: the global optimum, not a search.

    For a given s the nearest level is 0.5 s below magnitude s and 1.5 s above, so an optimal choice
    splits the sorted magnitudes. With the k smallest at 0.5 the best s is num / den, and num^2 / den is
    what it takes off the squared error; prefix sums give it for every k at once.

    Cost: O(N log N) per row, in float64.
    """
    columns_N = np.ones(weight_ON.shape[1]) if column_weights_N is None else np.asarray(column_weights_N, np.float64)
    if columns_N.shape != weight_ON.shape[1:] or not np.isfinite(columns_N).all() or (columns_N < 0).any():
        expected = f"{weight_ON.shape[1]} finite numbers from 0 on"
        raise ConfigError("column weights that cannot be used", expected=expected, found=columns_N.shape)
    if not columns_N.any():
        raise ConfigError("column weights that are all zero")
    if per_tensor:
        flat, counts = weight_ON.reshape(1, -1), np.tile(columns_N, len(weight_ON))
        return np.repeat(_fit_rows(flat, counts, uniform=column_weights_N is None), len(weight_ON))
    step = max(1, PIECE_VALUES // weight_ON.shape[1])
    pieces = [weight_ON[start : start + step] for start in range(0, len(weight_ON), step)]
    return np.concatenate([_fit_rows(piece, columns_N, uniform=column_weights_N is None) for piece in pieces])


def _fit_rows(weight_ON: Floats, columns_N: npt.NDArray[np.float64], *, uniform: bool) -> Floats:
    magnitudes = np.abs(weight_ON)
    if uniform:
        sums = np.cumsum(np.sort(magnitudes, axis=1), axis=1, dtype=np.float64)
        counts = np.arange(1.0, magnitudes.shape[1] + 1)[None]
    else:
        order = np.argsort(magnitudes, axis=1)
        counted = columns_N[order]
        sums = np.cumsum(np.take_along_axis(magnitudes, order, axis=1) * counted, axis=1)
        counts = np.cumsum(counted, axis=1)
    # sums[k - 1] belongs to k; k = 0 (all at 1.5) is k = n with a third of the scale, the same values.
    numerator = 1.5 * sums[:, -1:] - sums
    denominator = 2.25 * counts[:, -1:] - 2 * counts
    best = np.argmax(numerator * numerator / denominator, axis=1)[:, None]
    scales = np.take_along_axis(numerator, best, axis=1) / np.take_along_axis(denominator, best, axis=1)
    fitted: Floats = scales[:, 0].astype(np.float32)
    return fitted


def codes_of(weight_ON: Floats, scales_O: Floats) -> npt.NDArray[np.uint8]:
    """The code of the nearest level of each value, uint8 (O, N); a zero keeps its sign."""
    negative = np.signbit(weight_ON)
    large = np.abs(weight_ON) > scales_O[:, None]
    codes: npt.NDArray[np.uint8] = np.where(negative, 1 - large.astype(np.int8), 2 + large.astype(np.int8)).astype(
        np.uint8
    )
    return codes


def pack_codes(codes_ON: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Sixteen codes to a uint32, lowest bits first: (O, W).

    Raises:
        ConfigError: a number of columns that is not a multiple of 16.
    """
    rows, columns = codes_ON.shape
    if columns % CODES_PER_WORD:
        raise ConfigError("codes that do not fill their words", expected="a multiple of 16 columns", found=columns)
    four = codes_ON.reshape(rows, -1, 4)
    packed = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
    return np.ascontiguousarray(packed.astype(np.uint8)).view("<u4")


def unpack_codes(words_OW: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """The codes in packed words, uint8 (O, N)."""
    codes = (words_OW[..., None] >> SHIFTS) & np.uint32(3)
    return codes.reshape(len(words_OW), -1).astype(np.uint8)


def dequantize_balanced(codes_ON: npt.NDArray[np.uint8], scales_O: Floats, dtype: str = "float32") -> Floats:
    """The values, rounded once to `dtype` and held in float32."""
    levels = codes_ON.astype(np.float32) - np.float32(1.5)
    return rounded(levels * scales_O[:, None], dtype)


def rounded(values: Floats, dtype: str) -> Floats:
    """Float32 values rounded to nearest even in a dtype of fewer bits, still float32."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    high = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return high.view(np.float32)
