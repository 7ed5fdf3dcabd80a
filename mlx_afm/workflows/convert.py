"""Toolkit folder -> MLX folder, and back; MLX folder -> MLX folder of another dtype, quantized or dense again.

Each direction is the same walk: open and check the source, plan the target, see that it fits on the
disk, stream tensor by tensor into a temporary folder, verify if asked, rename.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_afm.adapters import Adapter, LoRAConfig, is_zero
from mlx_afm.checkpoints.arrays import FLOAT_DTYPES
from mlx_afm.checkpoints.mlx_checkpoint import (
    KEPT_FILES,
    TOKENIZER,
    model_tensors,
    observed_ranges,
    to_state_dict,
    toolkit_parts,
    write_config,
    write_toolkit_parts,
    write_torch_checkpoint,
)
from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.checkpoints.quantized import (
    bits_per_weight,
)
from mlx_afm.checkpoints.toolkit import ToolkitCheckpoint, find_toolkit_files, read_toolkit_checkpoint
from mlx_afm.checkpoints.verify import loaded_steps, require_same_steps, require_same_values
from mlx_afm.errors import ConfigError, FormatError, SettingError
from mlx_afm.files import atomic_folder, require_space, to_optional_path, to_path
from mlx_afm.folders import new_folder
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig
from mlx_afm.quant.residual import InitConfig
from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import Callback
from mlx_afm.training.hooks import ignore, notes_of
from mlx_afm.workflows.calibrate import Calibration, Source
from mlx_afm.workflows.convert_weights import WeightChange, Weights, change_weights, worth_keeping, write_weights

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
SPARE_BYTES = 64 << 20  # for headers, tokenizer, JSON


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        folder: where the result is.
        form: "mlx" or "torch".
        tensors: tensors written (the head's alias not counted).
        bytes: of their values.
        base_adapter: "none", "zero" or "active": whether the base carries an adapter that does something.
        verified: whether every value was read back and compared.
        wrapper_key: the key of a larger `.pt` that the state dict was found under, or None.
        bits_per_weight: of all tensors, the adapter's aside; None for a torch checkpoint.
        quantized: how many matrices are quantized, by form.
        on_grid: how many of them lay on the balanced grid already and kept every bit.
        left_dense: matrices that were to be quantized and whose width the groups do not divide.
        init_errors: of an adapter made now, by kind of projection: the squared error of the codes alone, and of codes
            and adapter, as a share of the squared weights.
    """

    folder: Path
    form: str
    tensors: int
    bytes: int
    base_adapter: str
    verified: bool
    wrapper_key: str | None = None
    bits_per_weight: float | None = None
    quantized: Mapping[str, int] = field(default_factory=dict)
    on_grid: int = 0
    left_dense: tuple[str, ...] = ()
    init_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Options:
    change: WeightChange
    config: Path | None
    no_tokenizer: bool
    verify: bool
    on_progress: OnProgress
    on_event: Callback


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "mlx",
    dtype: str | None = None,
    config: str | Path | None = None,
    no_tokenizer: bool = False,
    verify: bool = False,
    quantization: QuantConfig | None = None,
    dequantize: bool = False,
    init_adapter: InitConfig | None = None,
    calibration: Calibration | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_event: Callback = ignore,
) -> Converted:
    """Converts a model between the toolkit's form and MLX's, and between dense weights and codes.

    Args:
        source: for "mlx" a toolkit folder, its `assets`, a `.pt`, an MLX folder, or the hub id of one;
            for "torch" an MLX folder or hub id.
        target: the folder to write; it must not exist yet, or be empty.
        to: "mlx" or "torch".
        dtype: float32, bfloat16 or float16 for the weights; None keeps the source's. Adapters and
            quantizer steps stay float32.
        config: the JSON of a lone `.pt`, if it does not lie beside it.
        no_tokenizer: convert a folder that lacks `tokenizer.model`.
        verify: before the target appears, read everything back and compare it with the source: every value to the last
            bit, and balanced matrices, made dense again, with the weights they stand for. The steps of the key and
            value quantizers are always compared with what the observers' ranges imply.
        quantization: quantize projections and embedding. Matrices on the balanced grid are packed as they
            are. A base adapter that does nothing is left out of a quantized folder, which cannot go back to torch.
        dequantize: make the weights of a quantized folder dense.
        init_adapter: when quantizing, write a `base_adapter` that holds part of what rounding loses.
        calibration: when quantizing, fit balanced scales, and that adapter, to what the projections read in examples.
        on_progress: told of bytes written, and of all there are.
        on_event: is given notices, and the progress of what is computed before anything is written.

    Raises:
        FormatError: a part missing or damaged. ConfigError: a model that is not AFM text v7, an unknown
            setting, a target in the way or written by another process. DiskFullError: too little disk.
        TensorsError: tensors of another model, NaN or infinite weights, quantizer steps that the ranges do not imply,
            or a difference that `verify` found.

    Cost: some 64 MB blocks in memory, whatever the model's size; when quantizing about ten. `init_adapter`: see
    `start_values`; `calibration`: the dense model.

    The target appears when it is complete, or not at all.
    """
    folder, target = ModelFolder(source), to_path(target)
    change = WeightChange(
        dtype=dtype,
        quantization=quantization,
        dequantize=dequantize,
        init=init_adapter,
        calibration=calibration,
    )
    _require_sensible(to, change)
    options = _Options(
        change=change,
        config=to_optional_path(config),
        no_tokenizer=no_tokenizer,
        verify=verify,
        on_progress=on_progress,
        on_event=on_event,
    )
    return _convert(folder, target, to, options)


def _convert(folder: ModelFolder, target: Path, to: str, options: _Options) -> Converted:
    source = folder.path
    is_mlx = source.is_dir() and (source / "config.json").is_file()
    if options.config is not None and (is_mlx or to == "torch"):
        advice = "Leave it out: an MLX folder has its own config.json."
        raise SettingError("config is for a .pt of the toolkit", where=source, found=options.config, advice=advice)
    with new_folder(target, "--mlx-path", notes_of(options.on_event)):
        if to == "torch":
            return _mlx_to_torch(folder, target, options)
        if is_mlx:
            return _mlx_to_mlx(folder, target, options)
        return _torch_to_mlx(source, target, options)


def _require_sensible(to: str, change: WeightChange) -> None:
    if change.dtype is not None and change.dtype not in FLOAT_DTYPES:
        raise SettingError("unknown dtype", expected=" or ".join(FLOAT_DTYPES), found=change.dtype)
    if to not in ("mlx", "torch"):
        raise SettingError("unknown form", where="to", expected="mlx or torch", found=to)
    if to == "torch" and (change.quantization is not None or change.dequantize):
        raise SettingError("a torch checkpoint has no codes", advice="Quantize or dequantize to an MLX folder.")
    if change.quantization is not None and change.dequantize:
        raise SettingError("either quantize or dequantize")
    if change.quantization is None and (change.init is not None or change.calibration is not None):
        raise SettingError("init_adapter and calibration belong to quantizing", advice="Add -q, or leave them out.")


def _torch_to_mlx(source: Path, target: Path, options: _Options) -> Converted:
    files = find_toolkit_files(source, options.config)
    if files.tokenizer is None and not options.no_tokenizer:
        advice = "Put the toolkit's tokenizer.model beside the checkpoint, or pass --no-tokenizer to go without."
        raise FormatError("missing tokenizer.model", where=files.weights.parent, advice=advice)
    checkpoint = read_toolkit_checkpoint(files)
    own = _adapter_of(checkpoint)
    found = Source(model_tensors(checkpoint, None), checkpoint.config.model, files.tokenizer, own)
    weights = change_weights(found, {}, options.change, options.on_event, where=source)
    ids = {} if files.tokenizer is None else _token_ids(files.tokenizer, checkpoint)
    adapter = worth_keeping(own, weights)
    activity = _activity(own if weights.start is None else adapter)
    count = _Counter(weights.tensors, options.on_progress)
    wanted_bytes = count.total + _adapter_bytes(adapter) + SPARE_BYTES
    require_space(target, wanted_bytes)
    with atomic_folder(target, wanted_bytes) as partial:
        settings = write_weights(
            partial,
            weights,
            adapter,
            source=source,
            ranges=observed_ranges(checkpoint.config, checkpoint.tensors),
            verify=options.verify,
            on_bytes=count.add,
        )
        names_it = weights.start is None and (adapter is not None or checkpoint.config.adapter is None)
        write_toolkit_parts(partial, checkpoint, config=names_it)
        if files.tokenizer is not None:
            write_hf_tokenizer(files.tokenizer, partial)
        write_config(partial, checkpoint.config.model, {**settings, **ids})
    return _converted(target, weights, activity, options, checkpoint.wrapper_key)


def _mlx_to_mlx(source: ModelFolder, target: Path, options: _Options) -> Converted:
    own, schemes = source.base_adapter, source.schemes
    found = Source(source.tensors, source.config, source.tokenizer_file, own)
    weights = change_weights(found, schemes, options.change, options.on_event, where=source.path)
    adapter = worth_keeping(own, weights)
    activity = _activity(own if weights.start is None else adapter)
    kept = source.kept_settings
    if schemes and not options.change.dequantize:
        kept.update(source.quantization_settings)
    count = _Counter(weights.tensors, options.on_progress)
    wanted_bytes = count.total + _adapter_bytes(adapter) + SPARE_BYTES
    require_space(target, wanted_bytes)
    with atomic_folder(target, wanted_bytes) as partial:
        settings = write_weights(
            partial,
            weights,
            adapter,
            source=source.path,
            ranges=observed_ranges(source.toolkit_config, source.observers),
            verify=options.verify,
            on_bytes=count.add,
        )
        names_it = weights.start is None and (adapter is not None or own is None)
        parts = toolkit_parts(source.path, config=names_it)
        for name in (*KEPT_FILES, *parts):
            if (source.path / name).is_file():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.path / name, partial / name)
        write_config(partial, source.config, {**settings, **{key: kept[key] for key in kept if key not in settings}})
    return _converted(target, weights, activity, options)


def _converted(
    target: Path, weights: Weights, activity: str, options: _Options, wrapper_key: str | None = None
) -> Converted:
    forms = Counter(str(scheme) for scheme in weights.schemes.values())
    return Converted(
        target,
        "mlx",
        len(weights.tensors),
        sum(tensor.nbytes for tensor in weights.tensors.values()),
        activity,
        options.verify,
        wrapper_key,
        bits_per_weight=round(bits_per_weight(weights.tensors, weights.schemes), 4),
        quantized=dict(forms),
        on_grid=0 if weights.made is None else len(weights.made.on_grid),
        left_dense=() if weights.made is None else weights.made.plan.left_dense,
        init_errors={} if weights.start is None else weights.start.errors,
    )


def _mlx_to_torch(source: ModelFolder, target: Path, options: _Options) -> Converted:
    if source.schemes:
        advice = "Make it dense first: mlx-afm convert -d --hf-path FOLDER --mlx-path DENSE"
        raise ConfigError("the toolkit has no quantized weights", where=source.path, advice=advice)
    adapter, config = source.base_adapter, source.toolkit_config
    tensors = {**source.tensors, **({} if adapter is None else adapter.weights)}
    state = to_state_dict(config, tensors, source.observers, options.change.dtype, where=source.path)
    count = _Counter(state, options.on_progress)
    require_space(target, count.total + SPARE_BYTES)
    with atomic_folder(target, count.total + SPARE_BYTES) as partial:
        write_torch_checkpoint(source.path, partial, config, state, count.add)
        written = read_torch(partial / "base-model.pt")
        ranges = observed_ranges(config, written)
        require_same_steps(ranges, loaded_steps(source.path, ranges.keys()), where=source.path)
        if source.tokenizer_file is not None:
            shutil.copyfile(source.tokenizer_file, partial / TOKENIZER)
        if options.verify:
            aliases = {"output_transform.weight": state["embedding.weight"]}
            require_same_values({**state, **aliases}, written, where=partial)
    return Converted(target, "torch", len(state), count.total, _activity(adapter), options.verify)


class _Counter:
    """Adds up bytes written for whoever watches."""

    def __init__(self, tensors: Mapping[str, LazyTensor], on_progress: OnProgress) -> None:
        self.total = sum(tensor.nbytes for tensor in tensors.values())
        self.done, self.on_progress = 0, on_progress

    def add(self, count: int) -> None:
        self.done += count
        self.on_progress(self.done, self.total)


def _token_ids(file: Path, checkpoint: ToolkitCheckpoint) -> dict[str, object]:
    tokenizer = AFMTokenizer.from_file(file)
    rows = checkpoint.config.model.vocab_size
    if tokenizer.vocab_size > rows:
        expected, found = f"at most {rows} pieces", tokenizer.vocab_size
        raise ConfigError("the tokenizer does not belong to this model", where=file, expected=expected, found=found)
    # mlx-lm stops at any of these.
    return {"eos_token_id": [tokenizer.turn_end_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}


def _adapter_of(checkpoint: ToolkitCheckpoint) -> Adapter | None:
    spec = checkpoint.config.adapter
    if spec is None:
        return None
    entries = [entry for entry in plan_names(checkpoint.config) if entry.kind is Kind.ADAPTER]
    weights = {entry.ours: checkpoint.tensors[entry.toolkit] for entry in entries}
    return Adapter(LoRAConfig(rank=spec.rank, scale=spec.scale), checkpoint.config.model, weights, spec.name)


def _adapter_bytes(adapter: Adapter | None) -> int:
    return 0 if adapter is None else sum(tensor.nbytes for tensor in adapter.weights.values())


def _activity(adapter: Adapter | None) -> str:
    return "none" if adapter is None else "zero" if is_zero(adapter) else "active"
