"""MLX model folders: mlx-lm's layout, and what its names cannot hold beside it.

config.json, model*.safetensors, model.safetensors.index.json    as mlx-lm has them
tokenizer.model and what transformers' AutoTokenizer needs       if the source had a tokenizer
mlx_afm_model.py                    of a quantized folder: where mlx-lm finds our model, see `interop`
toolkit/base-model-config.json      the toolkit's JSON, byte for byte
toolkit/observers.safetensors       ranges and counters of the K/V quantizers, by the toolkit's names
base_adapter/                       the adapter tensors of base-model.pt, an adapter folder
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm.checkpoints.arrays import cast
from mlx_afm.checkpoints.finite import finite_while_read, require_finite, require_finite_arrays
from mlx_afm.checkpoints.names import Kind, TensorEntry, layer_of, plan_names
from mlx_afm.checkpoints.quantized import KEY
from mlx_afm.checkpoints.toolkit import ToolkitCheckpoint, quantizer_scale, range_of_scale
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import OpenFiles, write_json
from mlx_afm.formats.safetensors_file import write_safetensors
from mlx_afm.formats.tensors import LazyTensor, OnBytes
from mlx_afm.formats.torch_file import write_torch
from mlx_afm.model import AFMConfig, Model, ToolkitConfig, to_toolkit_config
from mlx_afm.model.projections import quantize_modules
from mlx_afm.quant import Scheme
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS
from mlx_afm.tree import require_same_tensors

TOOLKIT_CONFIG = Path("toolkit", "base-model-config.json")
OBSERVERS = Path("toolkit", "observers.safetensors")
BASE_ADAPTER = "base_adapter"
TOKENIZER = "tokenizer.model"
SMALL = (".scales", ".biases")  # of quantized matrices
NORM = "model.output_norm.weight"  # never quantized: its dtype is the model's
# What goes along when a folder is fused or cast: the tokenizer, and settings other programs read.
KEPT_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
QUANTIZATION_KEYS = (KEY, "quantization_config")
KEPT_KEYS = ("eos_token_id", "pad_token_id", "torch_dtype", SYSTEM_PROMPTS)


def read_config_json(folder: Path, files: OpenFiles) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        FormatError: not a model folder.
    """
    if not folder.is_dir():
        raise FormatError("no such folder", where=folder, expected="an MLX model folder")
    if not (folder / "config.json").is_file():
        advice = "Convert a toolkit folder first: mlx-afm convert --hf-path TOOLKIT --mlx-path FOLDER"
        raise FormatError("no config.json", where=folder, expected="an MLX model folder", advice=advice)
    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise FormatError("not a JSON object", where=folder / "config.json")
    return values


def parse_config(values: Mapping[str, Any], *, where: object) -> AFMConfig:
    """The sizes of the model that a `config.json` describes.

    Raises:
        ConfigError: not an AFM text v7 model.
    """
    try:
        return AFMConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(
            error.what, where=where, expected=error.expected, found=error.found, details=error.details
        ) from None


def load_weights(
    folder: Path,
    config: AFMConfig,
    schemes: Mapping[str, Scheme],
    tensors: Mapping[str, LazyTensor],
    *,
    lazy: bool = False,
    layers: range | None = None,
) -> Model:
    """The model of a folder in evaluation mode; names and shapes are checked before a value is read.

    Args:
        folder: whose shards MLX reads.
        config, schemes, tensors: what was read of it; see `ModelFolder`.
        lazy: leave the weights on disk until they are used.
        layers: those whose weights are wanted, None for all; the others stay on disk and are not checked.

    Raises:
        TensorsError: weights of another model, or NaN or infinite ones, all named.
    """
    model = Model(config)
    if schemes:
        norm = tensors.get(NORM)
        quantize_modules(model, schemes, mx.float32 if norm is None else getattr(mx, norm.dtype))
    expected = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    require_same_tensors(expected, found, where=folder)
    wanted = {
        name for name in tensors if layers is None or (layer := layer_of(name, config)) is None or layer in layers
    }
    if lazy:
        small = {n: t for n, t in tensors.items() if n in wanted and (len(t.shape) < 2 or n.endswith(SMALL))}
        require_finite(small, where=folder)
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    model.load_weights(list(weights.items()))
    model.eval()
    if not lazy:
        arrays = {name: array for name, array in tree_flatten(model.parameters()) if name in wanted}
        mx.eval(arrays)
        require_finite_arrays(arrays, where=folder)
    return model


def model_tensors(checkpoint: ToolkitCheckpoint, dtype: str | None) -> dict[str, LazyTensor]:
    """The model's tensors by our names, cast when they are read; quantizer steps stay float32."""
    tensors = {}
    for entry in plan_names(checkpoint.config):
        source = checkpoint.tensors[entry.toolkit]
        if entry.kind is Kind.WEIGHT:
            tensors[entry.ours] = cast(source, dtype)
        elif entry.kind is Kind.RANGE:
            tensors[entry.ours] = LazyTensor.of(np.array(quantizer_scale(source.read_values(), where=entry.toolkit)))
    return tensors


def observed_ranges(config: ToolkitConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The observers' (min, max) among tensors by the toolkit's names, by the names of the steps that they imply."""
    entries = [entry for entry in plan_names(config) if entry.kind is Kind.RANGE and entry.toolkit in tensors]
    return {entry.ours: tensors[entry.toolkit] for entry in entries}


def write_config(folder: Path, config: AFMConfig, settings: Mapping[str, Any]) -> None:
    """Writes `config.json`, last of all: a folder without it is no model folder, whatever else it holds."""
    write_json(folder / "config.json", {**config.to_dict(), "tie_word_embeddings": True, **settings})


def toolkit_parts(folder: Path, *, config: bool = True) -> list[str]:
    """Relative paths of what the toolkit's side needs, as far as a folder has it; with or without its JSON."""
    parts = (TOOLKIT_CONFIG, OBSERVERS) if config else (OBSERVERS,)
    return [str(part) for part in parts if (folder / part).is_file()]


def write_toolkit_parts(folder: Path, checkpoint: ToolkitCheckpoint, *, config: bool = True) -> None:
    """Writes the observers beside the weights, and the toolkit's JSON unless the adapter it names is left out."""
    (folder / TOOLKIT_CONFIG).parent.mkdir(exist_ok=True)
    if config:
        (folder / TOOLKIT_CONFIG).write_bytes(checkpoint.config_text)
    kinds = (Kind.RANGE, Kind.SAMPLES)
    names = [entry.toolkit for entry in plan_names(checkpoint.config) if entry.kind in kinds]
    if names:
        write_safetensors(folder / OBSERVERS, {name: checkpoint.tensors[name] for name in names})


def to_state_dict(
    config: ToolkitConfig,
    tensors: Mapping[str, LazyTensor],
    observers: Mapping[str, LazyTensor],
    dtype: str | None,
    *,
    where: Path,
) -> dict[str, LazyTensor]:
    """A dense model as the toolkit's state dict, without the head's alias; values are still on disk.

    Args:
        config: the toolkit's configuration.
        tensors: the model's weights and those of the base adapter that `config` names, by our names.
        observers: the observers' tensors by the toolkit's names.
        dtype: cast weights to this when they are read; None keeps them.
        where: the MLX folder, for messages.

    Reading a tensor that holds NaN or infinite values raises `TensorsError`.

    Raises:
        TensorsError: a tensor that the configuration asks for is missing.
    """
    ours = finite_while_read(tensors, where=where)
    entries = plan_names(config)
    wanted = {e.ours: e.shape for e in entries if e.kind in (Kind.WEIGHT, Kind.ADAPTER)}
    scales: dict[str, tuple[int, ...]] = {e.ours: () for e in entries if e.kind is Kind.RANGE}
    require_same_tensors({**wanted, **scales}, {name: tensor.shape for name, tensor in ours.items()}, where=where)
    return {e.toolkit: _state_value(e, ours, observers, dtype) for e in entries if e.kind is not Kind.ALIAS}


def write_torch_checkpoint(
    source: Path,
    target: Path,
    config: ToolkitConfig,
    state: Mapping[str, LazyTensor],
    on_bytes: OnBytes,
    stem: str = "base-model",
) -> None:
    """Writes `base-model.pt` and its JSON, the one the folder `source` came with if there is one; or with another stem.

    Raises:
        TensorsError: NaN or infinite weights, all named.
    """
    aliases = {"output_transform.weight": "embedding.weight"}
    finite = finite_while_read(state, where=source)
    write_torch(target / f"{stem}.pt", finite, aliases=aliases, on_bytes=on_bytes)
    if (source / TOOLKIT_CONFIG).is_file():
        (target / f"{stem}-config.json").write_bytes((source / TOOLKIT_CONFIG).read_bytes())
    else:
        write_json(target / f"{stem}-config.json", to_toolkit_config(config))


def _state_value(
    entry: TensorEntry, ours: Mapping[str, LazyTensor], observers: Mapping[str, LazyTensor], dtype: str | None
) -> LazyTensor:
    if entry.kind in (Kind.WEIGHT, Kind.ADAPTER):
        return cast(ours[entry.ours], dtype if entry.kind is Kind.WEIGHT else None)
    if entry.toolkit in observers:
        return observers[entry.toolkit]
    if entry.kind is Kind.SAMPLES:  # a folder that never was a toolkit checkpoint: the counter only has to be set
        return LazyTensor.of(np.array(1, np.int64))
    return LazyTensor.of(range_of_scale(ours[entry.ours].read_values(), where=entry.ours))
