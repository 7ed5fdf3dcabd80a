"""The names a state dict's pickle may hold, and what calling them gives: descriptions, never objects of torch.

Byte layout: none of its own; `torch_opcodes` reads the names, `torch_pickle` writes them.
Limits: `MAX_DIMENSIONS` and `MAX_KEY_DIGITS`. Arguments must have exactly the types and number torch writes.
Versions: `_rebuild_tensor_v2` with its optional seventh argument (conjugate and negative views) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_afm.formats.tensors import STORAGE_DTYPES

MAX_DIMENSIONS = 32
MAX_KEY_DIGITS = 20

STORAGE_TYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
# Known by name, so that a tensor of such a dtype can be named in the refusal.
_OTHER_DTYPES = (
    *("complex32", "complex64", "complex128", "float4_e2m1fn_x2"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name: what it is for and, for storage types and dtypes, the dtype (None: untyped bytes)."""

    role: str
    dtype: str | None = None


GLOBALS: dict[tuple[str, str], Global] = {
    ("collections", "OrderedDict"): Global("dict"),
    ("torch._utils", "_rebuild_tensor_v2"): Global("tensor"),
    ("torch._utils", "_rebuild_tensor_v3"): Global("tensor of dtype"),
    ("torch._utils", "_rebuild_parameter"): Global("parameter"),
    ("torch.storage", "UntypedStorage"): Global("storage"),
    **{("torch", name): Global("storage", dtype) for name, dtype in STORAGE_TYPES.items()},
    **{("torch", dtype): Global("dtype", dtype) for dtype in (*STORAGE_DTYPES, *_OTHER_DTYPES)},
}


@dataclass(frozen=True, slots=True)
class RawStorage:
    """A storage as a persistent id names it; `numel` counts bytes if dtype is None (untyped)."""

    dtype: str | None
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """The arguments of a rebuild call, of the right types but with nothing else checked."""

    dtype: str
    storage: RawStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def kind_of(value: object) -> str:
    """What a parsed value is, for messages: bounded, whatever the value holds."""
    return {RawTensor: "tensor", RawStorage: "storage", Global: "name"}.get(type(value), type(value).__name__)


def short(text: str, limit: int = 80) -> str:
    """Quoted text, cut to about `limit` characters."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")


def storage_of(identity: object) -> RawStorage | None:
    """What a persistent id names; None if it is not one of torch's storages.

    It is ("storage", type, key, device, numel); in the legacy form a sixth element is None.
    """
    if type(identity) is not tuple or len(identity) not in (5, 6):
        return None
    word, kind, key, device, numel, view = identity if len(identity) == 6 else (*identity, None)
    if type(kind) is not Global or kind.role != "storage" or type(numel) is not int or view is not None:
        return None
    if type(word) is not str or word != "storage" or type(device) is not str or not _is_storage_key(key):
        return None
    return RawStorage(kind.dtype, key, numel)


def called(function: object, arguments: object) -> dict[Any, Any] | RawTensor | None:
    """What a call gives: an empty dict or a tensor; None if torch would not write such a call."""
    if type(function) is not Global or type(arguments) is not tuple:
        return None
    if function.role == "dict":
        return None if arguments else {}
    rebuild = _REBUILDERS.get(function.role)
    return rebuild(arguments) if rebuild else None


def _is_storage_key(key: object) -> bool:
    return type(key) is str and key.isascii() and key.isdigit() and len(key) <= MAX_KEY_DIGITS


def _is_sizes(value: object) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(item) is int for item in value)


def _is_empty_dict(value: object) -> bool:
    return type(value) is dict and not value


def _tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> RawTensor | None:
    if len(arguments) != 6:
        return None
    storage, offset, shape, strides, requires_grad, hooks = arguments
    typed = type(storage) is RawStorage and (storage.dtype is None) == (dtype is not None)
    plain = type(offset) is int and type(requires_grad) is bool and _is_empty_dict(hooks)
    if not (typed and plain and _is_sizes(shape) and _is_sizes(strides)):
        return None
    return RawTensor(dtype or storage.dtype, storage, offset, shape, strides)


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> RawTensor | None:
    dtype = arguments[-1] if len(arguments) == 7 else None
    if type(dtype) is not Global or dtype.role != "dtype":
        return None
    return _tensor(arguments[:6], dtype.dtype)


def _parameter(arguments: tuple[Any, ...]) -> RawTensor | None:
    match arguments:
        case (RawTensor() as tensor, bool(), hooks) if _is_empty_dict(hooks):
            return tensor
    return None


_REBUILDERS: dict[str, Callable[[tuple[Any, ...]], RawTensor | None]] = {
    "tensor": _tensor,
    "tensor of dtype": _tensor_of_dtype,
    "parameter": _parameter,
}
