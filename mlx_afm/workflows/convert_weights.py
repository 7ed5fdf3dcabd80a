"""The weights of a conversion to an MLX folder: as they are, cast, quantized, or dense again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.adapters import Adapter, is_zero, write_adapter_folder
from mlx_afm.adapters.config import DEFAULT_SCALE
from mlx_afm.adapters.store import WEIGHTS
from mlx_afm.checkpoints.finite import finite_while_read, require_finite
from mlx_afm.checkpoints.mlx_checkpoint import BASE_ADAPTER, NORM
from mlx_afm.checkpoints.quantized import (
    Quantization,
    cast_tensors,
    dequantize_tensors,
    quantize_tensors,
    to_quantization_json,
)
from mlx_afm.checkpoints.verify import loaded_steps, require_close_codes, require_same_steps, require_same_values
from mlx_afm.errors import ConfigError
from mlx_afm.formats.mlx_folder import read_shards, write_shards
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.tensors import LazyTensor, OnBytes
from mlx_afm.interop import write_shim
from mlx_afm.quant import QuantConfig, Scheme
from mlx_afm.quant.residual import InitConfig
from mlx_afm.training import Callback
from mlx_afm.training.hooks import ignore
from mlx_afm.workflows.calibrate import Calibration, Source, calibrated
from mlx_afm.workflows.initial_adapter import Start, start_values


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """What is to become of the weights; see `convert`."""

    dtype: str | None = None
    quantization: QuantConfig | None = None
    dequantize: bool = False
    init: InitConfig | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Weights:
    """What will be written.

    Attributes:
        tensors: in order.
        schemes: the quantized matrices.
        made: how they came about, if they are made now.
        computed: by MLX while they are written, so not in another thread.
        start: the adapter that goes with the codes, if one is made now.
    """

    tensors: Mapping[str, LazyTensor]
    schemes: Mapping[str, Scheme]
    made: Quantization | None = None
    computed: bool = False
    start: Start | None = None


def change_weights(
    source: Source, schemes: Mapping[str, Scheme], change: WeightChange, on_event: Callback = ignore, *, where: Path
) -> Weights:
    """The tensors that a change makes of a model's; computed are only calibration and an adapter's start value.

    Raises:
        ConfigError: codes are to be made of codes, or dense weights dense; and see `calibrated`, `start_values`.
    """
    tensors = source.tensors
    if change.quantization is not None:
        if schemes:
            advice = "Make it dense first (convert -d); every further rounding loses."
            raise ConfigError("the model is quantized already", where=where, advice=advice)
        return _in_codes(source, change.quantization, change, on_event, where=where)
    if change.dequantize:
        if not schemes:
            raise ConfigError("nothing to dequantize", where=where, expected="a quantized MLX folder")
        dense = dequantize_tensors(tensors, schemes, change.dtype or tensors[NORM].dtype)
        return Weights(dense, {}, computed=True)
    return Weights(cast_tensors(tensors, schemes, change.dtype), schemes)


def _in_codes(source: Source, config: QuantConfig, change: WeightChange, on_event: Callback, *, where: Path) -> Weights:
    if change.init is not None and source.adapter is not None and not is_zero(source.adapter):
        advice = "Fuse it first (mlx-afm fuse), or leave --init-adapter out."
        raise ConfigError("the base model has an active adapter already", where=where, advice=advice)
    if change.init is not None or change.calibration is not None:  # both compute with every value before it is written
        require_finite(source.tensors, where=where)
    if change.calibration is not None:
        config = calibrated(config, source, change.calibration, on_event, weighs_start=change.init is not None)
    made = quantize_tensors(source.tensors, config, change.dtype, where=where)
    if change.init is None:
        return Weights(made.tensors, made.plan.schemes, made, computed=True)
    start = start_values(
        source.tensors,
        made.plan.schemes,
        source.base,
        change.init,
        dtype=change.dtype,
        column_weights=config.column_weights,
        on_event=on_event,
    )
    if start.tensors:  # float32, so the dtype of the others must be said
        dtype = change.dtype or source.tensors[NORM].dtype
        made = quantize_tensors({**source.tensors, **start.tensors}, config, dtype, where=where)
    return Weights(made.tensors, made.plan.schemes, made, computed=True, start=start)


def write_weights(
    partial: Path,
    weights: Weights,
    adapter: Adapter | None,
    *,
    source: Path,
    ranges: Mapping[str, LazyTensor],
    verify: bool,
    on_bytes: OnBytes,
) -> dict[str, object]:
    """Writes weights and base adapter, read back if asked; returns what `config.json` has to say of them.

    Args:
        partial: the folder.
        weights, adapter: what to write.
        source: where they come from, for messages.
        ranges: of the toolkit's observers, by the names of the quantizer steps that they imply, as far as known.
        verify: compare what was written with the source.
        on_bytes: told of bytes written.

    Raises:
        TensorsError: NaN or infinite weights, quantizer steps that the ranges do not imply, or something that `verify`
            found.
    """
    write_shards(
        partial, finite_while_read(weights.tensors, where=source), on_bytes=on_bytes, ahead=not weights.computed
    )
    if adapter is not None:
        require_finite(adapter.weights, where=source)
        write_adapter_folder(partial / BASE_ADAPTER, adapter)
    require_same_steps(ranges, loaded_steps(partial, ranges.keys()), where=source)
    if verify:
        written = read_shards(partial)
        require_same_values(weights.tensors, written, where=partial)
        if adapter is not None:
            require_same_values(adapter.weights, read_safetensors(partial / BASE_ADAPTER / WEIGHTS), where=partial)
        if weights.made is not None:
            require_close_codes(weights.made, written, where=partial)
    settings: dict[str, object] = {"torch_dtype": weights.tensors[NORM].dtype}
    if weights.made is not None:
        settings["quantization"] = to_quantization_json(weights.made.plan)
    if weights.schemes:
        settings.update(write_shim(partial))
    return settings


def worth_keeping(adapter: Adapter | None, weights: Weights) -> Adapter | None:
    """The base adapter, or the one made now; none in a quantized folder if it does nothing and has the usual scale."""
    if weights.start is not None:
        return weights.start.adapter
    if adapter is None or not weights.schemes or adapter.config.scale != DEFAULT_SCALE or not is_zero(adapter):
        return adapter
    return None
