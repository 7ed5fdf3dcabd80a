"""Quantizing a model with an adapter that already holds part of what the rounding loses; see `quant.residual`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_shapes
from mlx_afm.checkpoints.quantized import row_blocks
from mlx_afm.errors import ConfigError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model import AFMConfig
from mlx_afm.model.packed import Packed
from mlx_afm.quant import Scheme, dequantize_balanced, quantize_balanced
from mlx_afm.quant.balanced import grid_scales
from mlx_afm.quant.residual import Floats, InitConfig, ResidualSplit, split
from mlx_afm.quant.scheme import BALANCED
from mlx_afm.training import Callback, StageProgress
from mlx_afm.training.hooks import ignore

PARTS = ("q", "k", "v")
DIGITS = 5
STAGE = "computing the initial adapter"


@dataclass(frozen=True)
class Start:
    """What quantizing begins with.

    Attributes:
        tensors: matrices to be quantized instead of the model's own, by tensor name.
        adapter: the start value.
        errors: by kind of projection, the squared error of the outputs' weights before and after, see `ResidualSplit`.
    """

    tensors: dict[str, LazyTensor]
    adapter: Adapter
    errors: dict[str, tuple[float, float]]


def start_values(
    tensors: Mapping[str, LazyTensor],
    schemes: Mapping[str, Scheme],
    base: AFMConfig,
    config: InitConfig,
    *,
    dtype: str | None,
    column_weights: Mapping[str, npt.NDArray[Any]],
    on_event: Callback = ignore,
) -> Start:
    """An adapter from singular directions, and the matrices that are left to be rounded.

    Args:
        tensors: a dense model.
        schemes: which matrices are quantized, and how.
        base: sizes of the model.
        config: see `InitConfig`.
        dtype: of the quantized model; None keeps the dense one's.
        column_weights: by module path, see `QuantConfig`.
        on_event: is given the progress, in matrices.

    Raises:
        ConfigError: every matrix lies on a grid already, so that nothing is lost.

    Cost: one matrix in float32 some six times over, and the low-rank parts, twice with more than one round or
        weight-svd. About as long as quantizing for each round, and the directions: some seconds for each matrix of
        the real model.
    """
    form = LoRAConfig(rank=config.rank, scale=config.scale)
    weights = {name: LazyTensor.of(np.zeros(shape, np.float32)) for name, shape in adapter_shapes(base, form).items()}
    replaced: dict[str, LazyTensor] = {}
    errors: dict[str, list[tuple[float, float]]] = {}
    adapted = _adapted(weights)
    for done, (path, parts) in enumerate(adapted.items()):
        on_event(StageProgress(stage=STAGE, done=done, total=len(adapted), unit="matrices"))
        name = f"{path}.weight"
        if path not in schemes or _on_grid(tensors[name]):
            continue
        stored = dtype or tensors[name].dtype.replace("float64", "float32")
        rounding = partial(rounded, scheme=schemes[path], dtype=stored, column_weights_N=column_weights.get(path))
        made = _split_rows(_whole(tensors[name]), parts, weights, rounding, config, column_weights.get(path))
        for part, piece in made.items():
            weights.update(_arrays(part, piece, config.scale))
            errors.setdefault(part.rpartition(".")[2], []).append((piece.error_before, piece.error_after))
        if any(piece.taken_a_NR is not None for piece in made.values()):
            replaced[name] = _rest(tensors[name], list(made.values()))
    on_event(StageProgress(stage=STAGE, done=len(adapted), total=len(adapted), unit="matrices"))
    if not errors:
        raise ConfigError("nothing is lost: every matrix lies on the grid", advice="Leave --init-adapter out.")
    means = {kind: np.mean(pairs, axis=0).round(DIGITS).tolist() for kind, pairs in errors.items()}
    return Start(replaced, Adapter(form, base, weights), {kind: (pair[0], pair[1]) for kind, pair in means.items()})


def rounded(weight_ON: Floats, *, scheme: Scheme, dtype: str, column_weights_N: Any = None) -> Floats:
    """A matrix as its codes will have it, float32; the way `convert` makes them."""
    if scheme.mode == BALANCED:
        done = quantize_balanced(weight_ON, column_weights_N=column_weights_N)
        return dequantize_balanced(done.codes_ON, done.scales_O)
    arrays = mx.quantize(mx.array(weight_ON).astype(getattr(mx, dtype)), **scheme.to_dict())
    values: Floats = np.array(Packed(scheme, *arrays).dense())
    return values


def _adapted(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules that the adapter's tensors belong to, each with its parts: itself, or q, k and v of it."""
    found: dict[str, list[str]] = {}
    for name in names:
        part, _, array = name.rpartition(".")
        path, _, last = part.rpartition(".")
        if array == "lora_a":
            found.setdefault(path if last in PARTS else part, []).append(part)
    return found


def _split_rows(
    weight_ON: Floats,
    parts: list[str],
    adapter: Mapping[str, LazyTensor],
    rounding: Callable[[Floats], Floats],
    config: InitConfig,
    column_weights_N: Any,
) -> dict[str, ResidualSplit]:
    """Each part by itself: scales are by row and groups within rows, so rounding knows no other rows."""
    made, first = {}, 0
    for part in parts:
        rows = adapter[f"{part}.lora_b"].shape[1]
        made[part] = split(weight_ON[first : first + rows], rounding, config, column_weights_N)
        first += rows
    return made


def _arrays(part: str, piece: ResidualSplit, scale: float) -> dict[str, LazyTensor]:
    """The adapter's arrays; the root of its scale goes out of each."""
    root = np.float32(np.sqrt(scale))
    return {
        f"{part}.lora_a": LazyTensor.of(np.ascontiguousarray(piece.a_NR / root)),
        f"{part}.lora_b": LazyTensor.of(np.ascontiguousarray(piece.b_RO / root)),
    }


def _rest(source: LazyTensor, pieces: list[ResidualSplit]) -> LazyTensor:
    """The matrix without what was taken out, computed when it is quantized."""

    def read() -> Floats:
        weight_ON, rows, first = _whole(source), [], 0
        for piece in pieces:
            count = piece.b_RO.shape[1]
            rows.append(piece.rounded_from(weight_ON[first : first + count]))
            first += count
        return np.concatenate(rows)

    return LazyTensor("float32", source.shape, read)


def _whole(tensor: LazyTensor) -> Floats:
    return tensor.read_values().astype(np.float32, copy=False)


def _on_grid(tensor: LazyTensor) -> bool:
    blocks: Iterator[Floats] = row_blocks(tensor, first_rows=16)
    return tensor.dtype != "float64" and all(grid_scales(rows, tensor.dtype)[1].all() for rows in blocks)
