"""What was written against what should have been: bit by bit, and what the model will compute with.

A value that is derived (the step of a key quantizer from its observer's range, a quantized matrix) is not compared with
a second run of the code that derived it: it is computed here in another way, from numbers that MLX reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_afm.checkpoints.arrays import from_float32, to_float32, to_mlx
from mlx_afm.checkpoints.quantized import Quantization, dense_tensor
from mlx_afm.errors import TensorsError
from mlx_afm.formats.mlx_folder import shard_files
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.quant.scheme import BALANCED
from mlx_afm.tree import require_same_tensors, shorten

# Largest relative error of a quantizer step, by the dtype it is stored in.
STEP_TOLERANCE = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# With the best scale of each row the squared error of a balanced matrix is never above that of a matrix of zeros.
LARGEST_SHARE = 1.0 + 1e-3


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


def require_same_steps(ranges: Mapping[str, LazyTensor], steps: Mapping[str, LazyTensor], *, where: object) -> None:
    """Checks that each quantizer step is the one that its observer's range implies.

    Args:
        ranges: by the name of the step in the model: (min, max) of the toolkit's observer, shape (2,).
        steps: by the same names: what the model computes with, shape ().
        where: for the message.

    Raises:
        TensorsError: steps that the ranges do not imply, all named with both values.
    """
    faults = []
    for name, observed in ranges.items():
        low, high = (float(end) for end in np.array(to_mlx(observed).astype(mx.float32)))
        expected, found = max(-low / 128, high / 127), float(np.array(to_mlx(steps[name]).astype(mx.float32)))
        if not abs(found - expected) <= STEP_TOLERANCE[steps[name].dtype] * expected:
            faults.append(f"{name}: expected {expected:.6g}, found {found:.6g}")
    if faults:
        what = "quantizer steps that the ranges of the toolkit's observers do not imply"
        advice = "Nothing was kept. Convert again from the toolkit's own checkpoint."
        raise TensorsError(what, where=where, advice=advice, details=shorten(faults))


def loaded_steps(folder: Path, names: Set[str]) -> dict[str, LazyTensor]:
    """The quantizer steps of an MLX folder as MLX loads them, by name, float32."""
    found = {}
    for file in shard_files(folder):
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        chosen = {name: array.astype(mx.float32) for name, array in arrays.items() if name in names}
        found.update({name: LazyTensor.of(np.array(array)) for name, array in chosen.items()})
    return found


def require_close_codes(made: Quantization, written: Mapping[str, LazyTensor], *, where: object) -> None:
    """Checks that balanced matrices, made dense as the model makes them, are near what they stand for.

    Args:
        made: what was quantized, and how; the matrices on the grid must be equal to the last bit.
        written: the quantized tensors.
        where: for the message.

    Raises:
        TensorsError: matrices that are not, all named.

    Cost: some megabytes of rows at a time; each matrix is read and made dense once.
    """
    faults = []
    for path, scheme in made.plan.schemes.items():
        if scheme.mode != BALANCED:
            continue
        source = made.sources[f"{path}.weight"]
        equal, share = _compare(source, dense_tensor(written, path, scheme, "float32"))
        if path in made.on_grid and not equal:
            faults.append(f"{path}.weight: lies on the grid, and its codes have other values")
        elif not share <= LARGEST_SHARE and path not in made.weighted:
            faults.append(f"{path}.weight: the squared error is {share:.3g} of the squared weights")
    if faults:
        what, advice = "quantized matrices that are not near their weights", "Nothing was kept. Report this."
        raise TensorsError(what, where=where, advice=advice, details=shorten(faults))


def _compare(source: LazyTensor, quantized: LazyTensor) -> tuple[bool, float]:
    """Whether all values are equal in the dtype of the source, and the squared error over the squared weights."""
    stored, first = source.read_stored().reshape(-1), 0
    equal, error, total = True, 0.0, 0.0
    for block in quantized.iter_stored():
        part = np.ascontiguousarray(stored[first : first + block.size])
        first += block.size
        weights = to_float32(part, source.dtype)
        rounded = to_float32(from_float32(block, source.dtype), source.dtype)
        equal = equal and np.array_equal(rounded, weights)
        error += float(np.sum(np.square(block - weights), dtype=np.float64))
        total += float(np.sum(np.square(weights), dtype=np.float64))
    return equal, error / total if total else float(error > 0)
