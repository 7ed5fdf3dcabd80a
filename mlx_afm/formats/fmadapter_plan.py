"""Which tensor lies where in `adapter_weights.bin`, and how its values are stored there.

The file holds no names: record i is the i-th tensor of the plan, ordinary layers first, then the layers that
reuse keys and values, counted upwards as numbers. Per layer, each module's A (in, r) is followed by its B
(r, out), named as in the checkpoint (`layers.segment_0.layer_3.attention.output_transform.adapters.
base_adapter.a_transpose`):

    ordinary   Q, K, V (lora_0..2 of `qkv_transform`), output, gate, up, down      14 records
    reusing    Q (`q_transform`), output, gate, up, down                           10 records

A value is rounded to fp16 and its matrix transposed: A is stored (r, in), B (out, r). The rows of B of Q and of
K are also reordered within each head, because the trained model rotates neighbouring pairs (2i, 2i+1) and the
device rotates halves (i, i + width/2). Example, one head of width 6::

    checkpoint rows  0 1 2 3 4 5   ->   stored rows  0 2 4 1 3 5

The LoRA scale is not folded in: the device multiplies by 16 / 32 itself.

Source: the state dict of tamm's AFMTextV7 with a LoRA adapter; compared with it in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.formats.tensors import LazyTensor

PIECE = 1 << 17  # values that stay in the processor's cache


@dataclass
class Rounding:
    """Errors of rounding to float16, in the values' own unit.

    Attributes:
        values: how many values were rounded.
        max_error: largest absolute error.
        worst_tensor: the tensor it was found in; "" while every value is exact.
        error_sum: sum of the absolute errors.
        vanished: values other than zero that became zero.
    """

    values: int = 0
    max_error: float = 0.0
    worst_tensor: str = ""
    error_sum: float = 0.0
    vanished: int = 0

    @property
    def mean_error(self) -> float:
        """Mean absolute error."""
        return self.error_sum / self.values if self.values else 0.0

    def add(self, name: str, values: npt.NDArray[Any], halves: npt.NDArray[np.float16]) -> None:
        """Counts one tensor: its finite values, and the same rounded."""
        flat, rounded = np.ascontiguousarray(values).reshape(-1), np.ascontiguousarray(halves).reshape(-1)
        self.values += flat.size
        if flat.dtype == np.float16:
            return
        for start in range(0, flat.size, PIECE):
            piece, back = flat[start : start + PIECE], rounded[start : start + PIECE].astype(flat.dtype)
            self.vanished += int(np.count_nonzero(piece)) - int(np.count_nonzero(back))
            np.subtract(back, piece, out=back)
            np.abs(back, out=back)
            self.error_sum += float(back.sum(dtype=np.float64))
            if (largest := float(back.max())) > self.max_error:
                self.max_error, self.worst_tensor = largest, name

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "values": self.values,
            "max_error": self.max_error,
            "mean_error": self.mean_error,
            "worst_tensor": self.worst_tensor,
            "vanished": self.vanished,
        }


_ADAPTER = "adapters.base_adapter"
_READABLE = ("float16", "float32", "float64")
# Far above any model of this family: keeps a hostile package from planning without end.
_LIMITS = {"ordinary_layers": 1024, "reuse_layers": 1024, "heads": 4096, "kv_heads": 4096}
_WIDEST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of the model an adapter is for; the defaults are Apple's.

    Attributes:
        ordinary_layers: layers with their own keys and values.
        reuse_layers: layers after them that reuse the keys and values of the last ordinary one.
        hidden: model width.
        heads: query heads, each `hidden / heads` wide.
        kv_heads: key and value heads.
        feed_forward: width of the feed-forward part.
        rank: LoRA rank.

    Raises:
        ConfigError: sizes that no model can have, all of them in one error.
    """

    ordinary_layers: int = 35
    reuse_layers: int = 21
    hidden: int = 2048
    heads: int = 16
    kv_heads: int = 2
    feed_forward: int = 6656
    rank: int = 32

    def __post_init__(self) -> None:
        faults = [fault for name, value in asdict(self).items() if (fault := _size_fault(name, value))]
        if not faults:
            if self.hidden % (2 * self.heads):
                faults.append(
                    f"hidden {self.hidden} is no multiple of 2 x {self.heads} heads: rotary pairs need even widths"
                )
            if self.heads % self.kv_heads:
                faults.append(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if faults:
            raise ConfigError("unusable model sizes", where="geometry", details=faults)

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads

    @classmethod
    def from_dict(cls, sizes: object) -> Geometry:
        """The geometry that `asdict` gave.

        Raises:
            ConfigError: not a mapping, or with unknown, missing or unusable sizes.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(sizes, dict) or set(sizes) != known:
            found = sorted(map(str, sizes))[:20] if isinstance(sizes, dict) else type(sizes).__name__
            raise ConfigError("not a geometry", expected=f"the keys {sorted(known)}", found=f"{found!s:.300}")
        return cls(**sizes)


def _size_fault(name: str, value: object) -> str | None:
    lowest, highest = (0 if name == "reuse_layers" else 1), _LIMITS.get(name, _WIDEST)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        return f"{name} must be a whole number from {lowest} to {highest}, not {value!r:.80}"
    return None


APPLE_GEOMETRY = Geometry()


@dataclass(frozen=True)
class Record:
    """One tensor of a package.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape in the checkpoint: (in, r) for an A, (r, out) for a B.
        heads: heads whose rows are reordered for the device; 0 where rows stay as they are.
    """

    name: str
    shape: tuple[int, int]
    heads: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape in the file: the transpose."""
        return self.shape[1], self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the fp16 payload."""
        return 2 * self.shape[0] * self.shape[1]


def plan_records(geometry: Geometry = APPLE_GEOMETRY) -> list[Record]:
    """The tensors of a package for this geometry, in file order (700 for Apple's)."""
    # Without reusing layers the checkpoint has one uniform stack and no segment in its names.
    first = "layers.segment_0" if geometry.reuse_layers else "layers"
    segments = [(first, geometry.ordinary_layers, _ordinary_modules(geometry))]
    segments.append(("layers.segment_1", geometry.reuse_layers, _reuse_modules(geometry)))
    return [
        record
        for segment, layers, modules in segments
        for layer in range(layers)
        for module in modules
        for record in module.records(f"{segment}.layer_{layer}", geometry.rank)
    ]


@dataclass(frozen=True)
class _Module:
    """A linear layer with an adapter; `part` names one of several fused into it, e.g. "lora_1."."""

    name: str
    inputs: int
    outputs: int
    heads: int = 0
    part: str = ""

    def records(self, layer: str, rank: int) -> Iterator[Record]:
        prefix = f"{layer}.{self.name}.{_ADAPTER}.{self.part}"
        yield Record(f"{prefix}a_transpose", (self.inputs, rank), 0)
        yield Record(f"{prefix}b_transpose", (rank, self.outputs), self.heads)


def _ordinary_modules(geometry: Geometry) -> list[_Module]:
    hidden, keys = geometry.hidden, geometry.kv_heads * geometry.head_width
    return [
        _Module("attention.qkv_transform", hidden, hidden, geometry.heads, "lora_0."),
        _Module("attention.qkv_transform", hidden, keys, geometry.kv_heads, "lora_1."),
        _Module("attention.qkv_transform", hidden, keys, 0, "lora_2."),
        *_common_modules(geometry),
    ]


def _reuse_modules(geometry: Geometry) -> list[_Module]:
    query = _Module("attention.q_transform", geometry.hidden, geometry.hidden, geometry.heads)
    return [query, *_common_modules(geometry)]


def _common_modules(geometry: Geometry) -> list[_Module]:
    hidden, inner = geometry.hidden, geometry.feed_forward
    return [
        _Module("attention.output_transform", hidden, hidden),
        _Module("feed_forward.hidden_transform.linear_0", hidden, inner),
        _Module("feed_forward.hidden_transform.linear_1", hidden, inner),
        _Module("feed_forward.output_transform", inner, hidden),
    ]


def tensor_fault(tensor: LazyTensor | npt.NDArray[Any], record: Record) -> str | None:
    """What keeps a tensor from being stored as `record`, by its shape and dtype; None if nothing does."""
    dtype = tensor.dtype if isinstance(tensor, LazyTensor) else tensor.dtype.name
    if tensor.shape != record.shape:
        return f"{record.name}: expected shape {record.shape}, found {tensor.shape}"
    if dtype not in _READABLE:
        return f"{record.name}: expected float32, found {dtype}"
    return None


def stored_values(
    tensor: LazyTensor | npt.NDArray[Any], record: Record, rounding: Rounding | None = None
) -> npt.NDArray[np.float16]:
    """The tensor as the file holds it: fp16, transposed, rows of rotary heads reordered.

    Args:
        tensor: of the checkpoint.
        record: its place.
        rounding: told what becoming fp16 costs.

    Shapes: `record.shape` float32 (or float16, float64) to `record.stored_shape` float16, contiguous.

    Raises:
        AdapterError: another shape or dtype; values that are not finite or become infinite in fp16.
    """
    if fault := tensor_fault(tensor, record):
        raise AdapterError("cannot be exported", details=[fault])
    values = tensor.read_values() if isinstance(tensor, LazyTensor) else tensor
    with np.errstate(over="ignore", under="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise _overflow(values, halves, record)
    if rounding is not None:
        rounding.add(record.name, values, halves)
    stored = halves.T
    if record.heads:
        rows, rank = record.stored_shape
        pairs = stored.reshape(record.heads, rows // record.heads // 2, 2, rank)
        stored = pairs.swapaxes(1, 2).reshape(rows, rank)
    return np.ascontiguousarray(stored)


def loaded_values(stored: npt.NDArray[np.float16], record: Record) -> npt.NDArray[np.float16]:
    """The inverse of `stored_values`: `record.shape` float16 from the values of a file (flat or not).

    Cost: a view, except where rows are reordered.
    """
    rows, rank = record.stored_shape
    if record.heads:
        halves = stored.reshape(record.heads, 2, rows // record.heads // 2, rank)
        stored = halves.swapaxes(1, 2)
    return stored.reshape(rows, rank).T


def _overflow(values: npt.NDArray[Any], halves: npt.NDArray[np.float16], record: Record) -> AdapterError:
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        return AdapterError(
            f"{bad} values are infinite or not numbers",
            where=record.name,
            advice="The training diverged: export an earlier adapter",
        )
    return AdapterError(
        f"{np.count_nonzero(~np.isfinite(halves))} values are too large for fp16",
        where=record.name,
        expected="at most 65504",
        found=f"{np.abs(values).max():g}",
        advice="Export an earlier adapter, or train again with a lower learning rate",
    )
