"""What was written against what should have been, value by value."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_afm.errors import TensorsError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.tree import require_same_tensors, shorten


def require_same_values(wanted: Mapping[str, LazyTensor], written: Mapping[str, LazyTensor], *, where: object) -> None:
    """Compares two sets of tensors to the last bit, a block at a time.

    Raises:
        TensorsError: other names, shapes, dtypes or values; all of them named.
    """
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (wanted, written))
    require_same_tensors(*shapes, where=where)
    faults = []
    for name, tensor in wanted.items():
        other = written[name]
        if tensor.dtype != other.dtype:
            faults.append(f"{name}: expected {tensor.dtype}, found {other.dtype}")
        elif any(a != b for a, b in zip(tensor.iter_bytes(name), other.iter_bytes(name), strict=True)):
            faults.append(f"{name}: other values")
    if faults:
        advice = "The disk or the memory is faulty; nothing was kept."
        raise TensorsError("what was written is not what was read", where=where, advice=advice, details=shorten(faults))
