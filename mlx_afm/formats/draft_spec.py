"""`checkpoint_spec.yaml`: which draft tensor goes where in `weights_template.bin`, and in which form.

The document, as parsed (whoever reads the YAML hands over plain mappings and lists)::

    weights_mapping:
      decoder.output_norm.scale:
        format: fp16                # or linear_4bits, lut_4bits
        shape: [1, 256, 1, 1]       # dimensions of 1 do not count
        blobs:
          values: {offset: 64}      # place of a *metadata block* of the template

    format         blobs                               element types a blob may have
    fp16           values                              fp16 or fp32
    linear_4bits   values, scales                      int4 or int8; fp16 or fp32
    lut_4bits      lut_indices, lut_palette, scales    uint4 or uint8; fp16 or fp32; fp16 or fp32

What is unknown is refused: other formats, blobs and keys. Limits: `MAX_TENSORS` tensors of `MAX_VALUES` values.
`require_places` compares the places with the template: each offset names a record, no record is named twice, and
the record has the type and the size that the tensor needs, to the bit.

Source: public descriptions of the toolkit's exporter. The file itself was never seen.

Draft weights in the three forms of a checkpoint spec, and as the bytes of a record.

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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.formats.blob import FP16, TYPES, Blob
from mlx_afm.formats.kmeans_1d import cluster_groups

FP32, UINT8, INT8, INT4, UINT4 = 2, 3, 4, 8, 11
REALS, SIGNED, UNSIGNED = (FP16, FP32), (INT4, INT8), (UINT4, UINT8)
# Format -> its blobs and the type codes each may have.
FORMATS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "fp16": {"values": REALS},
    "linear_4bits": {"values": SIGNED, "scales": REALS},
    "lut_4bits": {"lut_indices": UNSIGNED, "lut_palette": REALS, "scales": REALS},
}
GROUP_CHANNELS = 16  # output channels that share a palette
PALETTE = 16
MAX_TENSORS = 65_536
MAX_VALUES = 1 << 32
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class DraftTensor:
    """One tensor of the spec.

    Attributes:
        name: its name there.
        format: a key of `FORMATS`.
        shape: without dimensions of 1.
        offsets: blob -> place of its metadata block.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    offsets: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """Blob -> number of its elements."""
        values = prod(self.shape)
        if self.format == "fp16":
            return {"values": values}
        if self.format == "linear_4bits":
            return {"values": values, "scales": self.shape[-1]}
        palettes = self.shape[0] // GROUP_CHANNELS * PALETTE
        return {"lut_indices": values, "lut_palette": palettes, "scales": self.shape[0]}


def without_units(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its dimensions of 1."""
    return tuple(size for size in shape if size != 1)


def parse_spec(document: Any, *, where: object) -> list[DraftTensor]:
    """The tensors of a spec, in its order.

    Raises:
        FormatError: not such a document; all faults in one error.
    """
    mapping = document.get("weights_mapping") if isinstance(document, dict) else None
    if not isinstance(mapping, dict) or not mapping or len(mapping) > MAX_TENSORS:
        expected = f"weights_mapping with 1 to {MAX_TENSORS} tensors"
        raise FormatError("not a checkpoint spec", where=where, expected=expected)
    faults = [f"key {_shown(key)} is not known" for key in document if key != "weights_mapping"]
    for name, entry in mapping.items():
        faults += [f"{_shown(name)}: {fault}" for fault in _entry_faults(name, entry)]
    _raise(faults, "a checkpoint spec that cannot be followed", where)
    return [
        DraftTensor(
            name, entry["format"], without_units(entry["shape"]), {k: b["offset"] for k, b in entry["blobs"].items()}
        )
        for name, entry in mapping.items()
    ]


def _entry_faults(name: Any, entry: Any) -> Iterator[str]:
    wanted = {"format", "shape", "blobs"}
    if not isinstance(name, str) or not isinstance(entry, dict) or set(entry) != wanted:
        found = ", ".join(sorted(map(_shown, entry))) if isinstance(entry, dict) else _shown(entry)
        yield f"expected the keys format, shape and blobs, found {found:.200}"
        return
    shape, blobs = entry["shape"], entry["blobs"]
    if not isinstance(entry["format"], str) or entry["format"] not in FORMATS:
        yield f"format {_shown(entry['format'])} is not one of {', '.join(FORMATS)}"
        return
    if not isinstance(shape, list) or not all(_is_count(size) and size for size in shape) or prod(shape) > MAX_VALUES:
        yield f"shape {_shown(shape)} is no list of sizes of at most {MAX_VALUES} values"
    else:
        yield from _shape_faults(entry["format"], without_units(shape))
    places = FORMATS[entry["format"]]
    if not isinstance(blobs, dict) or set(blobs) != set(places):
        yield f"blobs: expected {', '.join(places)} for {entry['format']}, found {_shown(blobs)}"
        return
    for role, place in blobs.items():
        if not isinstance(place, dict) or set(place) != {"offset"} or not _is_count(place["offset"]):
            yield f"{role}: expected an offset and nothing else, found {_shown(place)}"


def _shape_faults(form: str, shape: tuple[int, ...]) -> Iterator[str]:
    if form != "fp16" and len(shape) != 2:
        yield f"{form} is for matrices, the shape is {shape}"
    elif form == "lut_4bits" and shape[0] % GROUP_CHANNELS:
        yield f"lut_4bits has a palette for {GROUP_CHANNELS} channels, {shape[0]} is no multiple of that"


def require_places(tensors: Sequence[DraftTensor], template: Sequence[Blob], *, where: object) -> dict[int, Blob]:
    """The template's records by their place, once every place of the spec was found to fit.

    Raises:
        FormatError: an offset that names no record, or one named before; another type or size than needed.
    """
    records = {blob.metadata_offset: blob for blob in template}
    faults: list[str] = []
    taken: dict[int, str] = {}
    for tensor in tensors:
        counts = tensor.counts()
        for role, offset in tensor.offsets.items():
            label = f"{tensor.name}, {role} at {offset}"
            if offset not in records:
                faults.append(f"{label}: the template has no metadata block there")
            elif offset in taken:
                faults.append(f"{label}: the place of {taken[offset]} too")
            elif fault := _record_fault(records[offset], FORMATS[tensor.format][role], counts[role]):
                faults.append(f"{label}: {fault}")
            taken.setdefault(offset, f"{tensor.name}, {role}")
    _raise(faults, "the spec does not fit the template", where)
    return records


def _record_fault(blob: Blob, codes: tuple[int, ...], count: int) -> str | None:
    if blob.type_code not in codes:
        return f"expected {' or '.join(TYPES[code].name for code in codes)}, the template has {blob.dtype}"
    bits = count * TYPES[blob.type_code].bits
    wanted = (-(-bits // 8), -bits % 8)
    if (blob.nbytes, blob.padding_bits) != wanted:
        return f"expected {wanted[0]} bytes for {count} of {blob.dtype}, the template has {blob.nbytes}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: object) -> str:
    return f"{value!r:.100}" if isinstance(value, (int, str)) and len(str(value)[:101]) <= 100 else f"{value!s:.100}"


def _raise(faults: list[str], what: str, where: object) -> None:
    if faults:
        more = [f"... {len(faults)} faults in all"] * (len(faults) > _SHOWN_FAULTS)
        raise FormatError(what, where=where, details=faults[:_SHOWN_FAULTS] + more)


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
