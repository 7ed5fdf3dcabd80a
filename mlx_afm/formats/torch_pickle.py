"""State dicts as pickles: from `data.pkl` to tensor descriptions, and back.

Byte layout: a pickle by the rules of `torch_opcodes`. Its value is a dict, or an OrderedDict (with or without
`_metadata`, which is dropped), of tensors by name. A tensor is

    _rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, OrderedDict())
    _rebuild_tensor_v3(the same..., dtype)           uint16, uint32, uint64: untyped storage, its numel in bytes
    _rebuild_parameter(tensor, requires_grad, OrderedDict())
    storage = persistent id ("storage", type, key, device, numel)

Offsets and strides count elements. Tensors with one key share one storage.

Limits: those of `torch_opcodes` and `torch_names`; `MAX_TENSORS` tensors; `MAX_ELEMENTS` in a tensor. No tensor
reaches outside its storage; no stride is negative.
Versions: what is written is protocol 2, an OrderedDict without `_metadata`, memoised as CPython's pickler does it.

Contents: `torch_file` and `torch_legacy` find the parts of a checkpoint; which dictionary in it is the state dict is
decided here. Limits: one wrapper deep. A dictionary of tensors only is the state dict itself. Otherwise exactly one of
`WRAPPER_KEYS` must hold a dictionary with tensors; what stands beside it (epoch, optimizer, ...) has been parsed by
the rules of `torch_opcodes` and is let go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from mlx_afm.errors import FormatError
from mlx_afm.formats.tensors import STORAGE_DTYPES
from mlx_afm.formats.torch_names import STORAGE_TYPES, RawTensor, kind_of, short
from mlx_afm.formats.zip_reader import Member

MAX_TENSORS = 10_000
MAX_ELEMENTS = 1 << 48
_FAULTS_SHOWN = 20
_BATCH_ITEMS = 1000  # items per SETITEMS, as CPython's pickler


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies in which storage.

    Attributes:
        dtype: a key of `STORAGE_DTYPES`.
        shape: sizes; () for a scalar.
        strides: elements from one index to the next, per dimension.
        offset: elements before the first one.
        storage_key: decimal name of the storage.
        storage_numel: elements (of this dtype) in the whole storage.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage_key: str
    storage_numel: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def storage_bytes(self) -> int:
        """Bytes of the whole storage."""
        return self.storage_numel * STORAGE_DTYPES[self.dtype].itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a fresh tensor, as torch counts them: sizes of zero count as one."""
    return tuple(prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def specs_of(value: object, where: object) -> dict[str, TensorSpec]:
    """The tensors of a parsed state dict, in its order.

    Raises:
        FormatError: not a state dict; with all tensors at fault.
    """
    if type(value) is not dict:
        raise FormatError("not a state dict", where=where, expected="tensors by name", found=kind_of(value))
    _require_tensors_only(value, where)
    specs: dict[str, TensorSpec] = {}
    faults: list[str] = []
    for name, tensor in value.items():
        fault = _fault_of(tensor)
        if fault:
            faults.append(f"{short(name)}: {fault}")
        else:
            specs[name] = _spec(tensor)
    if faults:
        raise FormatError("tensors that cannot be read", where=where, details=shown(faults))
    return specs


def shown(faults: list[str]) -> list[str]:
    """The first faults, and how many more there are."""
    hidden = len(faults) - _FAULTS_SHOWN
    return faults if hidden <= 0 else [*faults[:_FAULTS_SHOWN], f"and {hidden} more"]


def _require_tensors_only(entries: dict[object, object], where: object) -> None:
    if len(entries) > MAX_TENSORS:
        raise FormatError("too many tensors", where=where, expected=f"<= {MAX_TENSORS}", found=len(entries))
    strays = [(key, value) for key, value in entries.items() if type(key) is not str or type(value) is not RawTensor]
    if strays:
        raise FormatError(
            "not a plain state dict",
            where=where,
            expected="tensors by name and nothing else",
            found="keys " + ", ".join(short(str(key)) for key in list(entries)[:8]),
            advice="Save the dictionary of tensors alone, such as torch.save(model.state_dict(), path)",
            details=shown([f"{short(str(key))}: {kind_of(value)}" for key, value in strays]),
        )


def _fault_of(tensor: RawTensor) -> str | None:
    """What is wrong with a tensor's description, or None."""
    if tensor.dtype not in STORAGE_DTYPES:
        return f"dtype {tensor.dtype} is not supported"
    if len(tensor.shape) != len(tensor.strides):
        return f"{len(tensor.shape)} sizes but {len(tensor.strides)} strides"
    if min((*tensor.shape, *tensor.strides, tensor.offset, tensor.storage.numel)) < 0:
        return "negative size, stride, offset or storage"
    if prod(size for size in tensor.shape if size) > MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements"
    if tensor.storage.dtype is None and tensor.storage.numel % STORAGE_DTYPES[tensor.dtype].itemsize:
        return f"storage of {tensor.storage.numel} bytes is no whole number of {tensor.dtype} elements"
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    numel = _storage_numel(tensor)
    if 0 not in tensor.shape and last >= numel:
        return f"reaches element {last} of a storage of {numel}"
    return None


def _storage_numel(tensor: RawTensor) -> int:
    itemsize = STORAGE_DTYPES[tensor.dtype].itemsize
    return tensor.storage.numel if tensor.storage.dtype else tensor.storage.numel // itemsize


def _spec(tensor: RawTensor) -> TensorSpec:
    numel = _storage_numel(tensor)
    return TensorSpec(tensor.dtype, tensor.shape, tensor.strides, tensor.offset, tensor.storage.key, numel)


_TYPE_NAMES = {dtype: name for name, dtype in STORAGE_TYPES.items() if dtype in STORAGE_DTYPES}


def pickle_state_dict(specs: Mapping[str, TensorSpec]) -> bytes:
    """The inverse of `parse_pickle` and `specs_of`, deterministic.

    Byte for byte what `torch.save` pickles for an OrderedDict of such tensors, except where CPython happens to
    hold a name and a storage key of two digits or more as one object.
    """
    pickler = _Pickler()
    pickler.ordered_dict()
    items = list(specs.items())
    for start in range(0, len(items), _BATCH_ITEMS):
        pickler.items(items[start : start + _BATCH_ITEMS])
    return bytes(pickler.out) + b"."


class _Pickler:
    """Writes opcodes; numbers memo entries in order, and fetches texts and names it has stored."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[tuple[str, ...], int] = {}
        self.stored = 0

    def put(self) -> None:
        index, self.stored = self.stored, self.stored + 1
        self.out += b"q" + bytes([index]) if index < 256 else b"r" + index.to_bytes(4, "little")

    def fetched(self, key: tuple[str, ...]) -> bool:
        """Fetches the entry of this key; False, with its number noted, if it is yet to be stored."""
        index = self.memo.setdefault(key, self.stored)
        if index == self.stored:
            return False
        self.out += b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little")
        return True

    def text(self, text: str) -> None:
        if not self.fetched((text,)):
            encoded = text.encode("utf-8")
            self.out += b"X" + len(encoded).to_bytes(4, "little") + encoded
            self.put()

    def name(self, module: str, name: str) -> None:
        if not self.fetched((module, name)):
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self.put()

    def integer(self, value: int) -> None:
        if value < 1 << 8:
            self.out += b"K" + value.to_bytes(1, "little")
        elif value < 1 << 16:
            self.out += b"M" + value.to_bytes(2, "little")
        elif value < 1 << 31:
            self.out += b"J" + value.to_bytes(4, "little")
        else:
            count = value.bit_length() // 8 + 1
            self.out += b"\x8a" + bytes([count]) + value.to_bytes(count, "little")

    def integers(self, values: tuple[int, ...]) -> None:
        self.out += b"(" if len(values) > 3 else b""
        for value in values:
            self.integer(value)
        self.out += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")
        if values:
            self.put()

    def ordered_dict(self) -> None:
        self.name("collections", "OrderedDict")
        self.out += b")R"
        self.put()

    def storage(self, spec: TensorSpec) -> None:
        typed = _TYPE_NAMES.get(spec.dtype)
        self.out += b"("
        self.text("storage")
        self.name(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        self.text(spec.storage_key)
        self.text("cpu")
        self.integer(spec.storage_numel if typed else spec.storage_bytes)
        self.out += b"t"
        self.put()
        self.out += b"Q"

    def tensor(self, spec: TensorSpec) -> None:
        """Adds the call that rebuilds one tensor."""
        typed = spec.dtype in _TYPE_NAMES
        self.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"("
        self.storage(spec)
        self.integer(spec.offset)
        self.integers(spec.shape)
        self.integers(spec.strides)
        self.out += b"\x89"
        self.ordered_dict()
        if not typed:
            self.name("torch", spec.dtype)
        self.out += b"t"
        self.put()
        self.out += b"R"
        self.put()

    def items(self, items: list[tuple[str, TensorSpec]]) -> None:
        self.out += b"(" if len(items) > 1 else b""
        for name, spec in items:
            self.text(name)
            self.tensor(spec)
        self.out += b"u" if len(items) > 1 else b"s"


WRAPPER_KEYS = ("state_dict", "model", "model_state_dict", "module", "weights")


class Contents(NamedTuple):
    """A checkpoint taken apart.

    Attributes:
        value: what was saved, as `torch_opcodes` describes it.
        where: the place of its pickle, for messages.
        storages: place of each storage's bytes, by key.
    """

    value: object
    where: str
    storages: Mapping[str, Member]


def unwrap(value: object, where: object) -> tuple[object, str | None]:
    """The state dict in a saved value, and the key it was under; None if it is the value itself.

    A value in which none is found is given back as it is: `torch_pickle.specs_of` says what is wrong with it.

    Raises:
        FormatError: several keys hold tensors.
    """
    if type(value) is not dict or all(type(entry) is RawTensor for entry in value.values()):
        return value, None
    candidates = [key for key in WRAPPER_KEYS if _holds_tensors(value.get(key))]
    if len(candidates) > 1:
        raise FormatError(
            "several state dicts in one checkpoint",
            where=where,
            expected="one of them",
            found=", ".join(map(repr, candidates)),
            advice=f"Save the one that is meant: torch.save(checkpoint[{candidates[0]!r}], path)",
        )
    return (value[candidates[0]], candidates[0]) if candidates else (value, None)


def _holds_tensors(value: object) -> bool:
    return type(value) is dict and any(type(entry) is RawTensor for entry in value.values())
