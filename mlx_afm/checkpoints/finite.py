"""NaN and infinite weights, found by tensor name: in tensors of files, in tensors being written, in MLX arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy.typing as npt

from mlx_afm.errors import TensorsError
from mlx_afm.formats.tensors import LazyTensor, count_nonfinite
from mlx_afm.tree import shorten

ADVICE = "The training that made them diverged, or the file is damaged. Use an earlier save or another copy."
FLOAT16 = "float16 holds at most 65504: choose bfloat16 or float32, or check the source."


def require_finite(tensors: Mapping[str, LazyTensor], *, where: object) -> None:
    """Checks that no value of the floating tensors is NaN or infinite.

    Raises:
        TensorsError: some are, every such tensor named with its count.

    Cost: reads every tensor once; the check runs at about the speed of memory.
    """
    counts = {name: count for name, tensor in tensors.items() if (count := tensor.count_nonfinite())}
    if counts:
        advice = FLOAT16 if any(tensors[name].dtype == "float16" for name in counts) else ADVICE
        raise _error(counts, {name: tensor.size for name, tensor in tensors.items()}, where, advice)


def finite_while_read(tensors: Mapping[str, LazyTensor], *, where: object) -> dict[str, LazyTensor]:
    """The same tensors; reading one that holds NaN or infinite values raises, so writing them needs no second pass.

    Args:
        tensors: about to be written; a value that its dtype cannot hold (float16 ends at 65504) is infinite here.
        where: the source, for the message.

    Raises:
        TensorsError: while a tensor is read; it names that tensor and every other one that has such values.
    """

    def checked(name: str, tensor: LazyTensor) -> LazyTensor:
        def stream() -> Iterator[npt.NDArray[Any]]:
            for block in tensor.iter_stored():
                if count_nonfinite(block, tensor.dtype):
                    require_finite(tensors, where=where)
                yield block

        return LazyTensor(tensor.dtype, tensor.shape, tensor.read_stored, stream)

    return {name: checked(name, tensor) for name, tensor in tensors.items()}


def require_finite_arrays(arrays: Mapping[str, mx.array], *, where: object) -> None:
    """Checks that no value of the floating arrays is NaN or infinite.

    Raises:
        TensorsError: some are, every such array named with its count.

    Cost: one sum per array, read at the speed of memory, and one evaluation for all of them.
    """
    counts = nonfinite_arrays(arrays)
    if counts:
        raise _error(counts, {name: array.size for name, array in arrays.items()}, where, ADVICE)


def nonfinite_arrays(arrays: Mapping[str, mx.array]) -> dict[str, int]:
    """Names of the floating arrays with NaN or infinite values, and how many each has."""
    floats = {name: array for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)}
    # A sum of finite values may overflow, but a sum with NaN or infinity in it is never finite.
    sums = {name: array.sum() for name, array in floats.items()}
    mx.eval(sums)
    suspects = {name: floats[name] for name, total in sums.items() if not mx.isfinite(total).item()}
    counts = {name: int((~mx.isfinite(array)).sum().item()) for name, array in suspects.items()}  # type: ignore[arg-type]
    return {name: count for name, count in counts.items() if count}


def _error(counts: Mapping[str, int], sizes: Mapping[str, int], where: object, advice: str) -> TensorsError:
    details = shorten([f"{name}: {count} of {sizes[name]} values" for name, count in counts.items()])
    what = f"weights that are not finite (NaN or infinite) in {len(counts)} of {len(sizes)} tensors"
    return TensorsError(what, where=where, advice=advice, details=details)
