"""Draft weights in the three forms of a checkpoint spec, and as the bytes of a record.

    fp16           each value rounded
    linear_4bits   per column of the last axis: scale = max |w| / 7, at least 1e-6; code = round(w / scale), half to
                   even, from -8 to 7
    lut_4bits      per row (output channel): scale = max |w|, 1 for a row of zeros; per 16 rows: a palette of the 16
                   best values for w / scale (`kmeans_1d`), ascending; code = place in the palette

Scales and palettes are computed in float32 and float64 and stored as fp16; the codes are those of the unrounded
ones. A record of another type than the form's usual one holds the same values: codes a byte each, fp16 widened.
Codes of 4 bits are packed with the first in the lower half of a byte.

Source: public descriptions of the toolkit's exporter; codes, scales and palettes compared with coremltools' own.
Whether the toolkit works in float32, and what it does with a row of zeros, is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.formats.blob import FP16, Blob
from mlx_afm.formats.draft_spec import FP32, GROUP_CHANNELS, INT4, PALETTE, UINT4
from mlx_afm.formats.kmeans_1d import cluster_groups

LEAST_SCALE = np.float32(1e-6)
_ROWS = 4096  # handled at a time, a multiple of the group

Array = npt.NDArray[Any]


def encode(weights: npt.NDArray[np.float32], form: str, name: str) -> Mapping[str, Array]:
    """Blob -> its values: float16, or codes as int8 or uint8.

    Shapes: weights as the spec says without dimensions of 1; (rows, columns) for the forms of 4 bits.

    Raises:
        FormatError: values that are not finite, or that fp16 cannot hold.

    Cost: the codes, a byte a value, and some blocks of `_ROWS` rows.
    """
    if not np.isfinite(weights).all():
        advice = "The training diverged: export an earlier checkpoint"
        raise FormatError("values that are infinite or not numbers", where=name, advice=advice)
    if form == "fp16":
        return {"values": _halves(weights, name)}
    return _linear(weights, name) if form == "linear_4bits" else _palettes(weights, name)


def _linear(weights: npt.NDArray[np.float32], name: str) -> dict[str, Array]:
    largest = np.max([np.abs(block).max(axis=0) for block in _blocks(weights)], axis=0)
    scales = np.maximum(largest / np.float32(7), LEAST_SCALE)
    codes = np.empty(weights.shape, np.int8)
    for start, block in zip(range(0, len(weights), _ROWS), _blocks(weights)):
        codes[start : start + _ROWS] = np.clip(np.rint(block / scales), -8, 7)
    return {"values": codes, "scales": _halves(scales, name)}


def _palettes(weights: npt.NDArray[np.float32], name: str) -> dict[str, Array]:
    scales, palettes, codes = [], [], []
    for block in _blocks(weights):
        scale = np.abs(block).max(axis=1)
        scale[scale == 0] = 1
        groups = (block / scale[:, None]).reshape(-1, GROUP_CHANNELS * block.shape[1])
        centroids, clusters = cluster_groups(groups, PALETTE)
        scales.append(scale)
        palettes.append(centroids.astype("<f2"))
        codes.append(clusters.reshape(block.shape))
    return {
        "lut_indices": np.concatenate(codes),
        "lut_palette": np.concatenate(palettes),
        "scales": _halves(np.concatenate(scales), name),
    }


def _blocks(weights: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    return [weights[start : start + _ROWS] for start in range(0, len(weights), _ROWS)]


def _halves(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        found = f"{np.abs(values).max():g}"
        raise FormatError("values too large for fp16", where=name, expected="at most 65504", found=found)
    return halves


def payload(values: Array, blob: Blob) -> npt.NDArray[np.uint8]:
    """The bytes of a record that holds these values; its type is one that the spec's rules allow for them."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if blob.type_code == FP16:
        return flat.astype("<f2", copy=False).view(np.uint8)
    if blob.type_code == FP32:
        return flat.astype("<f4").view(np.uint8)
    return pack_nibbles(flat) if blob.type_code in (INT4, UINT4) else flat.view(np.uint8)


def pack_nibbles(codes: Array) -> npt.NDArray[np.uint8]:
    """Two codes a byte, the first in the lower half; what is left of the last byte is zero.

    Example: int8 [1, -2, 3] -> E1 03.
    """
    low = np.concatenate([codes.astype(np.uint8), np.zeros(len(codes) % 2, np.uint8)]) & np.uint8(15)
    packed: npt.NDArray[np.uint8] = low[0::2] | (low[1::2] << np.uint8(4))
    return packed
