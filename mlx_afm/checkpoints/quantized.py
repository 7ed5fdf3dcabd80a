"""Quantized tensors of a model folder: made a block of rows at a time, and made dense again.

A matrix `X.weight` becomes `X.weight` (codes), `X.scales` and, of affine, `X.biases`, written in this order;
the small ones are ready when the codes have been. MLX computes them, in the thread that writes: such
tensors must be written without `ahead`.

Shape suffixes: O rows (outputs), N columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.checkpoints.arrays import cast, from_float32, to_float32
from mlx_afm.checkpoints.finite import require_finite
from mlx_afm.errors import ConfigError
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor, read_ahead
from mlx_afm.model.packed import Packed
from mlx_afm.quant import (
    QuantConfig,
    QuantizationPlan,
    Scheme,
    pack_codes,
    parse_scheme,
    plan_schemes,
    quantize_balanced,
)
from mlx_afm.quant.balanced import grid_scales
from mlx_afm.quant.scheme import BALANCED, GROUP_SIZES

Tensors = Mapping[str, LazyTensor]
STEPS = (".quant_key_scale", ".quant_value_scale")  # of the key and value quantizers: never cast
KEY = "quantization"
BLOCK_BYTES = 1 << 24  # of rows in float32: MLX holds some twenty times that to make small floats


def matrices(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Module path and shape of everything that can be quantized: projections and the embedding."""
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last == "weight" and len(tensor.shape) == 2 and f"{path}.scales" not in tensors:
            found[path] = (tensor.shape[0], tensor.shape[1])
    return found


@dataclass(frozen=True)
class Quantization:
    """A model's tensors with some quantized, still to be computed.

    Attributes:
        plan: which matrix takes which form.
        tensors: what is to be written, in order.
        sources: what they are made of.
        weighted: matrices whose scales were fitted with column weights, by module path.
        on_grid: matrices that lay on a balanced grid and keep their values, by module path; complete once
            the tensors are written.
    """

    plan: QuantizationPlan
    tensors: dict[str, LazyTensor]
    sources: Tensors
    weighted: frozenset[str] = frozenset()
    on_grid: set[str] = field(default_factory=set)


def quantize_tensors(
    tensors: Tensors, config: QuantConfig, dtype: str | None, *, where: object = "the model to quantize"
) -> Quantization:
    """The tensors with matrices quantized; nothing but the first rows of each matrix is read yet.

    A matrix on the balanced 2-bit grid is packed as it is, whatever the configuration says: any other
    form would move its values and take more room.

    Args:
        tensors: a dense model by our names.
        config: what to do.
        dtype: of everything else, and of affine scales; None keeps the model's.
        where: for messages.

    Reading a matrix that holds NaN or infinite values raises `TensorsError`, which names all such tensors.

    Raises:
        ConfigError: nothing can be quantized, or column weights for no matrix.
    """
    shapes = matrices(tensors)
    unknown = sorted(set(config.column_weights) - set(shapes))
    if unknown:
        raise ConfigError("column weights for matrices that the model does not have", details=unknown)
    plan = plan_schemes(config, shapes)
    schemes = {path: _kept_grid(tensors[f"{path}.weight"]) or scheme for path, scheme in plan.schemes.items()}
    plan = QuantizationPlan(plan.default, schemes, plan.left_dense)
    done = Quantization(plan, {}, tensors, frozenset(config.column_weights))
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last == "weight" and path in schemes:
            stored = dtype or tensor.dtype.replace("float64", "float32")
            weigh = config.column_weights.get(path)
            check = partial(require_finite, tensors, where=where)
            job = _Job(path, tensor, schemes[path], stored, weigh, done.on_grid, check)
            done.tensors.update(job.tensors())
        else:
            done.tensors[name] = tensor if name.endswith(STEPS) else cast(tensor, dtype)
    return done


def _kept_grid(tensor: LazyTensor) -> Scheme | None:
    """The balanced scheme of a matrix that lies on its grid in every row, or None."""
    sizes = [size for size in GROUP_SIZES[BALANCED] if tensor.shape[1] % size == 0 and size <= 64]
    if not sizes or tensor.dtype not in ("float32", "bfloat16", "float16"):
        return None
    for rows in row_blocks(tensor, first_rows=16):
        if not grid_scales(rows, tensor.dtype)[1].all():
            return None
    return Scheme(mode=BALANCED, group_size=max(sizes))


def row_blocks(tensor: LazyTensor, first_rows: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """The rows of a matrix, widened to float32, some megabytes at a time.

    With `first_rows` that many come first and alone (of a tensor that is not computed, at no cost).
    """
    columns = tensor.shape[1]
    if tensor.stream_stored is None:
        stored_ON = tensor.read_stored()
        step = max(1, BLOCK_BYTES // 4 // columns)
        starts = [0, *range(first_rows, len(stored_ON), step)] if first_rows else range(0, len(stored_ON), step)
        ends = [*list(starts)[1:], len(stored_ON)]
        for start, end in zip(starts, ends):
            yield to_float32(np.ascontiguousarray(stored_ON[start:end]), tensor.dtype)
        return
    kept = np.empty(0, STORAGE_DTYPES[tensor.dtype])
    for block in tensor.iter_stored():
        flat = np.concatenate([kept, block]) if kept.size else block
        whole = flat.size // columns * columns
        kept = flat[whole:]
        if whole:
            yield to_float32(flat[:whole].reshape(-1, columns), tensor.dtype)


class _Job:
    """One matrix on its way to codes."""

    def __init__(
        self,
        path: str,
        source: LazyTensor,
        scheme: Scheme,
        dtype: str,
        column_weights: Any,
        on_grid: set[str],
        check: Callable[[], None],
    ) -> None:
        self.path, self.source, self.scheme, self.dtype = path, source, scheme, dtype
        self.column_weights, self.on_grid, self.check = column_weights, on_grid, check
        self.small: dict[str, list[npt.NDArray[Any]]] = {}

    def tensors(self) -> dict[str, LazyTensor]:
        """The arrays by their full names; the codes first."""
        rows, columns = self.source.shape
        made = {}
        for name, (dtype, shape) in self.scheme.arrays(rows, columns, self.dtype).items():
            read, stream = partial(self.read, name), self.codes if name == "weight" else None
            made[f"{self.path}.{name}"] = LazyTensor(dtype, shape, read, stream)
        return made

    def codes(self) -> Iterator[npt.NDArray[Any]]:
        """The codes, flat, block by block; scales and biases are put aside."""
        self.small, exact = {}, True
        make = self._balanced if self.scheme.mode == BALANCED else self._by_mlx
        for rows_ON in read_ahead(row_blocks(self.source)):
            if not np.isfinite(rows_ON).all():
                self.check()
            weight, small, on_grid = make(rows_ON)
            exact = exact and on_grid
            for name, array in small.items():
                self.small.setdefault(name, []).append(array)
            yield weight.reshape(-1)
        if exact:
            self.on_grid.add(self.path)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays whole; scales and biases cost nothing once the codes were made."""
        if name == "weight":
            return np.concatenate(list(self.codes())).reshape(len(self.small["scales"][0]), -1)
        if not self.small:
            for _ in self.codes():
                pass
        return np.concatenate(self.small[name])

    def _balanced(self, rows_ON: npt.NDArray[np.float32]) -> tuple[Any, dict[str, Any], bool]:
        stored = self.source.dtype.replace("float64", "float32")
        done = quantize_balanced(rows_ON, dtype=stored, column_weights_N=self.column_weights)
        return pack_codes(done.codes_ON), {"scales": done.scales_O}, bool(done.exact_O.all())

    def _by_mlx(self, rows_ON: npt.NDArray[np.float32]) -> tuple[Any, dict[str, Any], bool]:
        weight = mx.array(rows_ON).astype(getattr(mx, self.dtype))
        made = [*mx.quantize(weight, **self.scheme.to_dict())]
        mx.eval(made)
        codes, *small = (np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array) for array in made)
        return codes, dict(zip(("scales", "biases"), small)), False


def cast_tensors(tensors: Tensors, schemes: Mapping[str, Scheme], dtype: str | None) -> dict[str, LazyTensor]:
    """The tensors in another dtype, cast when they are read; codes and all that belongs to them as they are."""
    return {
        name: tensor if name.endswith(STEPS) or name.rpartition(".")[0] in schemes else cast(tensor, dtype)
        for name, tensor in tensors.items()
    }


def dequantize_tensors(tensors: Tensors, schemes: Mapping[str, Scheme], dtype: str) -> dict[str, LazyTensor]:
    """The tensors with every matrix dense, in `dtype`, computed while they are written."""
    dense = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path not in schemes:
            dense[name] = tensor if name.endswith(STEPS) else cast(tensor, dtype)
        elif last == "weight":
            dense[name] = dense_tensor(tensors, path, schemes[path], dtype)
    return dense


def dense_tensor(tensors: Tensors, path: str, scheme: Scheme, dtype: str) -> LazyTensor:
    """A quantized matrix made dense in `dtype`, a block of rows at a time, when it is read."""
    codes = tensors[f"{path}.weight"]
    shape = (codes.shape[0], codes.shape[1] * 32 // scheme.bits)

    def blocks() -> Iterator[npt.NDArray[Any]]:
        arrays = [_readable(tensors[f"{path}.{name}"]) for name in scheme.arrays(*shape, dtype)]
        step = max(1, BLOCK_BYTES // 4 // shape[1])
        for start in range(0, shape[0], step):
            packed = Packed(scheme, *(read(slice(start, start + step)) for read in arrays))
            values_N = np.array(packed.dense()).reshape(-1)
            yield from_float32(values_N, dtype)

    return LazyTensor(dtype, shape, lambda: np.concatenate(list(blocks())).reshape(shape), blocks)


def _readable(tensor: LazyTensor) -> Any:
    """A function that gives some rows as an MLX array, 16-bit floats widened."""
    stored = tensor.read_stored()

    def read(rows: slice) -> mx.array:
        part = np.ascontiguousarray(stored[rows])
        return mx.array(to_float32(part, tensor.dtype) if tensor.dtype in ("bfloat16", "float16") else part)

    return read


def schemes_of(values: Mapping[str, Any], names: Any, *, where: object) -> dict[str, Scheme]:
    """Which modules of a folder are quantized, by `config.json` and the names of its tensors.

    Raises:
        ConfigError: quantized tensors that `config.json` does not explain, or none although it speaks of them.
    """
    paths = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    entry = values.get(KEY, values.get("quantization_config"))
    if not paths and entry is not None:
        advice = f"If the weights are dense, remove {KEY} from config.json."
        raise ConfigError("a quantization entry, but no quantized tensor", where=where, found=KEY, advice=advice)
    if not paths:
        return {}
    if not isinstance(entry, Mapping):
        raise ConfigError("quantized tensors without a quantization entry", where=where, found=f"{paths[0]}.scales")
    schemes = {}
    for path in paths:
        own = entry.get(path)
        schemes[path] = parse_scheme(own if isinstance(own, Mapping) else entry, where=f"{where}, {KEY}, {path}")
    return schemes


def to_quantization_json(plan: QuantizationPlan) -> dict[str, Any]:
    """The `quantization` entry: the default as mlx-lm has it, and every module that it does not describe.

    Balanced modules are always named: mlx-lm's loader would misread a scale per row.
    """
    others = {
        path: scheme.to_dict()
        for path, scheme in plan.schemes.items()
        if scheme != plan.default or scheme.mode == BALANCED
    }
    return {**plan.default.to_dict(), **others}


def bits_per_weight(tensors: Tensors, schemes: Mapping[str, Scheme]) -> float:
    """Bits of all tensors over the number of values they stand for."""
    return 8 * sum(tensor.nbytes for tensor in tensors.values()) / count_values(tensors, schemes)


def count_values(tensors: Tensors, schemes: Mapping[str, Scheme]) -> int:
    """How many values a model's tensors stand for; codes count as what they are codes of."""
    total = 0
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path not in schemes:
            total += tensor.size
        elif last == "weight":
            total += prod(tensor.shape) * 32 // schemes[path].bits
    return total
