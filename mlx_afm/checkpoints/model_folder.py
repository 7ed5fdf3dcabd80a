"""MLX model folders: mlx-lm's layout, and what its names cannot hold beside it.

config.json, model*.safetensors, model.safetensors.index.json    as mlx-lm has them
tokenizer.model and what transformers' AutoTokenizer needs       if the source had a tokenizer
mlx_afm_model.py                    of a quantised folder: where mlx-lm finds our model, see `interop`
toolkit/base-model-config.json      the toolkit's JSON, byte for byte
toolkit/observers.safetensors       ranges and counters of the K/V quantisers, by the toolkit's names
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
from mlx_afm.checkpoints.names import Kind, TensorEntry, plan_names
from mlx_afm.checkpoints.quantized import KEY, schemes_of
from mlx_afm.checkpoints.toolkit import ToolkitCheckpoint, quantizer_scale, range_of_scale
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import read_json, write_json
from mlx_afm.formats.mlx_folder import read_shards, shard_files
from mlx_afm.formats.safetensors_file import read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor, OnBytes
from mlx_afm.formats.torch_file import write_torch
from mlx_afm.model import AFMConfig, Model, ToolkitConfig, parse_toolkit_config, to_toolkit_config
from mlx_afm.model.quantized import quantize_modules
from mlx_afm.quant import Scheme
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS
from mlx_afm.tree import require_same_tensors

TOOLKIT_CONFIG = Path("toolkit", "base-model-config.json")
OBSERVERS = Path("toolkit", "observers.safetensors")
BASE_ADAPTER = "base_adapter"
SMALL = (".scales", ".biases")  # of quantized matrices
NORM = "model.output_norm.weight"  # never quantised: its dtype is the model's
# What goes along when a folder is fused or cast: the tokenizer, and settings other programs read.
KEPT_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
KEPT_KEYS = ("eos_token_id", "pad_token_id", "torch_dtype", SYSTEM_PROMPTS)


def read_config(folder: Path) -> AFMConfig:
    """The model configuration of a folder.

    Raises:
        FormatError: not a model folder. ConfigError: not an AFM text v7 model.
    """
    values = _read_config_json(folder)
    try:
        return AFMConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(
            error.what, where=folder / "config.json", expected=error.expected, found=error.found, details=error.details
        ) from None


def read_quantization(folder: Path) -> dict[str, Scheme]:
    """Which modules of a folder are in codes, by module path; none if it is dense.

    Raises:
        FormatError: not a model folder. ConfigError: codes of a form that is not explained or not known.
    """
    return schemes_of(_read_config_json(folder), read_shards(folder), where=folder / "config.json")


def quantization_settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says of codes, as it is."""
    values = _read_config_json(folder)
    return {key: values[key] for key in (KEY, "quantization_config") if key in values}


def _read_config_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FormatError("no such folder", where=folder, expected="an MLX model folder")
    if not (folder / "config.json").is_file():
        advice = "Convert a toolkit folder first: mlx-afm convert --hf-path TOOLKIT --mlx-path FOLDER"
        raise FormatError("no config.json", where=folder, expected="an MLX model folder", advice=advice)
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise FormatError("not a JSON object", where=folder / "config.json")
    return values


def model_tensors(checkpoint: ToolkitCheckpoint, dtype: str | None) -> dict[str, LazyTensor]:
    """The model's tensors by our names, cast when they are read; quantiser steps stay float32."""
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


def read_observers(folder: Path) -> dict[str, LazyTensor]:
    """The observers' tensors of a folder by the toolkit's names; none if it never was a toolkit checkpoint."""
    return read_safetensors(folder / OBSERVERS) if (folder / OBSERVERS).is_file() else {}


def write_config(folder: Path, config: AFMConfig, settings: Mapping[str, Any]) -> None:
    """Writes `config.json`, last of all: a folder without it is no model folder, whatever else it holds."""
    write_json(folder / "config.json", {**config.to_dict(), "tie_word_embeddings": True, **settings})


def kept_settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says beside the architecture and must go where the model goes."""
    values = _read_config_json(folder)
    return {key: values[key] for key in KEPT_KEYS if key in values}


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


def load_model(folder: Path, *, lazy: bool = False) -> Model:
    """The model of an MLX folder, names and shapes checked before a single value is read.

    Args:
        folder: an MLX model folder.
        lazy: leave the weights on disk until they are used.

    Raises:
        FormatError, ConfigError: see `read_config`. TensorsError: weights of another model, or NaN or infinite ones,
            all named. With `lazy` dense matrices are not checked for that, since they are not read.

    Cost: the check adds one pass over the weights in memory, some percent of the time to read them from disk.
    """
    model, tensors = Model(read_config(folder)), read_shards(folder)
    schemes = schemes_of(_read_config_json(folder), tensors, where=folder / "config.json")
    if schemes:
        norm = tensors.get(NORM)
        quantize_modules(model, schemes, mx.float32 if norm is None else getattr(mx, norm.dtype))
    expected = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    require_same_tensors(expected, found, where=folder)
    if lazy:
        require_finite({n: t for n, t in tensors.items() if len(t.shape) < 2 or n.endswith(SMALL)}, where=folder)
    weights: dict[str, mx.array] = {}
    for file in shard_files(folder):
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    model.load_weights(list(weights.items()))
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
        require_finite_arrays(dict(tree_flatten(model.parameters())), where=folder)
    return model


def read_toolkit_config(folder: Path) -> ToolkitConfig:
    """The toolkit's configuration a folder came from, or one made from its `config.json`."""
    if (folder / TOOLKIT_CONFIG).is_file():
        return parse_toolkit_config(read_json(folder / TOOLKIT_CONFIG), where=folder / TOOLKIT_CONFIG)
    return ToolkitConfig(model=read_config(folder), adapter=None)


def state_dict_of(
    source: Path, adapter: Mapping[str, LazyTensor], dtype: str | None
) -> tuple[ToolkitConfig, dict[str, LazyTensor]]:
    """An MLX folder as the toolkit's state dict, without the head's alias; values are still on disk.

    Args:
        source: the MLX folder.
        adapter: the base adapter by our names; needed if the toolkit's JSON names one.
        dtype: cast weights to this when they are read; None keeps them.

    Reading a tensor that holds NaN or infinite values raises `TensorsError`.

    Raises:
        ConfigError: a quantised folder. TensorsError: it lacks a tensor the configuration asks for.
    """
    if read_quantization(source):
        advice = "Make it dense first: mlx-afm convert -d --hf-path FOLDER --mlx-path DENSE"
        raise ConfigError("the toolkit has no quantised weights", where=source, advice=advice)
    config = read_toolkit_config(source)
    ours = finite_while_read({**read_shards(source), **adapter}, where=source)
    observers = read_observers(source)
    entries = plan_names(config)
    wanted = {e.ours: e.shape for e in entries if e.kind in (Kind.WEIGHT, Kind.ADAPTER)}
    scales: dict[str, tuple[int, ...]] = {e.ours: () for e in entries if e.kind is Kind.RANGE}
    require_same_tensors({**wanted, **scales}, {name: tensor.shape for name, tensor in ours.items()}, where=source)
    return config, {e.toolkit: _state_value(e, ours, observers, dtype) for e in entries if e.kind is not Kind.ALIAS}


def write_torch_checkpoint(
    source: Path, target: Path, config: ToolkitConfig, state: Mapping[str, LazyTensor], on_bytes: OnBytes
) -> None:
    """Writes `base-model.pt` and its JSON, the one the folder `source` came with if there is one.

    Raises:
        TensorsError: NaN or infinite weights, all named.
    """
    aliases = {"output_transform.weight": "embedding.weight"}
    finite = finite_while_read(state, where=source)
    write_torch(target / "base-model.pt", finite, aliases=aliases, on_bytes=on_bytes)
    if (source / TOOLKIT_CONFIG).is_file():
        (target / "base-model-config.json").write_bytes((source / TOOLKIT_CONFIG).read_bytes())
    else:
        write_json(target / "base-model-config.json", to_toolkit_config(config))


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
