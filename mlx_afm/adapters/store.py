"""Adapters on disk, in the three forms users have, told apart by suffix.

FOLDER/             adapters.safetensors + adapter_config.json, mlx-lm's layout
NAME.pt             the toolkit's adapter checkpoint: a torch state dict of its own names
NAME.fmadapter/     the package devices load (fp16; written here, read back exactly)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_afm.adapters.config import DEFAULT_SCALE, LoRAConfig, parse_adapter_json, to_adapter_json
from mlx_afm.adapters.layers import ALL, chosen_layers, coded_projections
from mlx_afm.checkpoints.arrays import cast
from mlx_afm.checkpoints.finite import require_finite
from mlx_afm.checkpoints.names import (
    DEFAULT_ADAPTER,
    Kind,
    TensorEntry,
    adapter_ids,
    count_layers,
    layer_of,
    plan_adapter,
    plan_names,
    target_of,
)
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.files import OpenFiles, atomic_folder, to_path, write_json
from mlx_afm.formats.fmadapter import METADATA_FILE, read_fmadapter
from mlx_afm.formats.fmadapter_metadata import read_metadata
from mlx_afm.formats.safetensors_file import read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.model import AdapterSpec, AFMConfig, ToolkitConfig
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS, SystemPrompts, parse_system_prompts
from mlx_afm.tree import require_same_tensors, require_unwrapped

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
OURS = "mlx_afm"  # the library's key in a package's `creatorDefined`
APPLE_HEADS = {(2048, 256): (16, 2)}  # (width, key width) -> heads of the shipped model


@dataclass(frozen=True)
class Adapter:
    """An adapter by our names; values may still be on disk.

    Attributes:
        config: its form.
        base: sizes of the model it was made for; None if a file does not say and its tensors do not tell.
        weights: `...lora_a` (in, R), `...lora_b` (R, out) and DoRA's `...m` (out,); of full fine-tuning
            the model's own weights; of qat `...weight` (out, in) and `...scales` (out,).
        name: the adapter id in the toolkit's names.
        system_prompts: of the data it was trained with; empty if the file does not say (a `.pt` never does).
    """

    config: LoRAConfig
    base: AFMConfig | None
    weights: Mapping[str, LazyTensor]
    name: str = DEFAULT_ADAPTER
    system_prompts: SystemPrompts = ()

    def require_base(self) -> AFMConfig:
        """The sizes of its model.

        Raises:
            AdapterError: they are unknown.
        """
        if self.base is None:
            advice = "Give the base model with --model; only Apple's own sizes are recognised without it."
            raise AdapterError("the adapter does not say which model it was made for", advice=advice)
        return self.base


def read_adapter(
    path: str | Path, base: AFMConfig | None = None, scale: float | None = None, files: OpenFiles | None = None
) -> Adapter:
    """Opens an adapter of any form; names, shapes and values are checked, values stay on disk.

    Args:
        path: a folder, a `.pt` or a `.fmadapter`.
        base: sizes of the model it should fit; an adapter for another model is refused.
        scale: of a `.pt`, which carries none; 0.5 if not given.
        files: keeps the files of a folder open for others, or has them open.

    Raises:
        FormatError: no such thing, or damaged. AdapterError: an adapter for another base model, or of
            another kind. TensorsError: tensors that are not an adapter's, or NaN or infinite ones, all listed.

    Cost: reads the file once.
    """
    path = to_path(path)
    if path.suffix == ".fmadapter":
        adapter = _read_package(path)
    elif path.suffix == ".pt":
        adapter = _read_pt(path, base, DEFAULT_SCALE if scale is None else scale)
    else:
        adapter = _read_folder(path, files or OpenFiles())
    if base is not None:
        _require_fit(adapter, base, path)
        adapter = replace(adapter, base=adapter.base or base)
    require_finite(adapter.weights, where=path)
    return adapter


def read_system_prompts(path: str | Path) -> SystemPrompts:
    """The system prompts that an adapter names, without its tensors; a `.pt` names none.

    Raises:
        FormatError: no such thing, or damaged. AdapterError: system prompts of another form.
    """
    path = to_path(path)
    if path.suffix == ".fmadapter":
        metadata, _ = read_metadata(path / METADATA_FILE)
        return _system_prompts(metadata.creator_defined.get(OURS), path / METADATA_FILE)
    return () if path.suffix == ".pt" else _system_prompts(_read_config(path, OpenFiles()), path / CONFIG)


def _require_no_lists(names: Iterable[str], path: Path) -> None:
    """Checks that the fused projection has a pair for each part and not the lists of mlx-lm's own afm7 class."""
    lists = [name for name in names if name.rpartition(".")[2].isdecimal()]
    if lists:
        what = "an adapter of mlx-lm's own afm7 class, whose fused projection has lists of arrays"
        advice = "Train it with mlx-afm lora, or with mlx-lm on a folder that mlx-afm converted."
        expected = lists[0].rpartition(".")[0].replace(".lora_", ".q.lora_")
        raise AdapterError(what, where=path, expected=expected, found=lists[0], advice=advice)


def _require_fit(adapter: Adapter, base: AFMConfig, path: Path) -> None:
    made_for = adapter.base
    sizes = ("hidden_dim", "num_layers", "num_kv_reuse_layers", "num_kv_heads", "num_heads", "feed_forward_dim")
    if made_for is not None:
        other = [
            f"{name}: the model has {getattr(base, name)}, the adapter was made for {getattr(made_for, name)}"
            for name in sizes
            if getattr(base, name) != getattr(made_for, name)
        ]
        if other:
            advice = "Use it with the model it was trained on."
            raise AdapterError("an adapter for another base model", where=path, advice=advice, details=other)
    found = {name: tensor.shape for name, tensor in adapter.weights.items()}
    try:
        shapes = adapter_shapes(base, adapter.config)
    except ConfigError as error:
        raise AdapterError(error.what, where=path, expected=error.expected, found=error.found) from error
    require_same_tensors(shapes, found, where=path, advice="Was it trained for another base model?")


def adapter_shapes(base: AFMConfig, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors, in the toolkit's order.

    Raises:
        ConfigError: layers that the base does not have.
    """
    layers = chosen_layers(config.layers, base)
    if config.fine_tune_type == "full":
        weights = [e for e in plan_names(ToolkitConfig(model=base, adapter=None)) if e.kind is Kind.WEIGHT]
        return {e.ours: e.shape for e in weights if config.layers == ALL or layer_of(e.ours, base) in layers}
    if config.fine_tune_type == "qat":
        coded = coded_projections(config.layers, config.targets, base)
        arrays = {path: {"weight": shape, "scales": shape[:1]} for path, shape in coded.items()}
        return {f"{path}.{name}": shape for path, pair in arrays.items() for name, shape in pair.items()}
    shapes = {}
    for entry in adapter_entries(base, config):
        if target_of(entry.ours) in config.targets and layer_of(entry.ours, base) in layers:
            shapes[entry.ours] = entry.shape
            if config.fine_tune_type == "dora" and entry.ours.endswith(".lora_b"):
                shapes[entry.ours.removesuffix("lora_b") + "m"] = entry.shape[-1:]
    return shapes


def adapter_entries(base: AFMConfig, config: LoRAConfig, name: str = DEFAULT_ADAPTER) -> list[TensorEntry]:
    """Every tensor of a LoRA adapter on all projections of all layers, in the toolkit's order."""
    return plan_adapter(base, AdapterSpec(name=name, rank=config.rank, alpha=config.scale * config.rank))


def _read_folder(path: Path, files: OpenFiles) -> Adapter:
    values = _read_config(path, files)
    config, base = parse_adapter_json(values, where=path / CONFIG)
    name, prompts = str(values.get("toolkit_name", DEFAULT_ADAPTER)), _system_prompts(values, path / CONFIG)
    tensors = read_safetensors(path / WEIGHTS, files)
    _require_no_lists(tensors, path / WEIGHTS)
    return Adapter(config, base, tensors, name, prompts)


def _read_config(path: Path, files: OpenFiles) -> Any:
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        expected = f"a folder with {WEIGHTS} and {CONFIG}, a .pt or a .fmadapter"
        raise AdapterError("no adapter here", where=path, expected=expected)
    return files.read_json(path / CONFIG)


def _system_prompts(values: Any, where: object) -> SystemPrompts:
    """Those of `adapter_config.json`, or of what the library wrote into a package."""
    found = values.get(SYSTEM_PROMPTS) if isinstance(values, Mapping) else None
    try:
        return parse_system_prompts(found)
    except ConfigError as error:
        raise AdapterError(f"cannot be used: {error}", where=where) from error


def _read_pt(path: Path, base: AFMConfig | None, scale: float) -> Adapter:
    tensors = {name: tensor for name, tensor in read_torch(path).items() if "adapter" in name}
    ids = adapter_ids(list(tensors))
    if len(ids) != 1:
        expected = "tensors named ...adapters.ID.... of one adapter"
        raise AdapterError("not a toolkit adapter checkpoint", where=path, expected=expected, found=ids or "none")
    require_unwrapped(tensors, where=path, start="layers.")
    first = next(iter(tensors.values()))
    config = LoRAConfig(rank=first.shape[-1], scale=scale)
    made_for = base or _apple_base(tensors)
    if made_for is None:
        advice = "Give the base model with --model; only Apple's own sizes are recognised without it."
        raise AdapterError("cannot tell which model this adapter is for", where=path, advice=advice)
    entries = adapter_entries(made_for, config, ids[0])
    expected_shapes = {entry.toolkit: entry.shape for entry in entries}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    advice = "Was it trained for another base model?"
    require_same_tensors(expected_shapes, found, where=path, advice=advice)
    return Adapter(config, made_for, {entry.ours: tensors[entry.toolkit] for entry in entries}, ids[0])


def _apple_base(tensors: Mapping[str, LazyTensor]) -> AFMConfig | None:
    """Sizes read off the tensors; only Apple's, since nothing tells how many heads another model has."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    widths = {name.rsplit(".", 1)[-1]: shape for name, shape in shapes.items() if ".lora_1." in name}
    width, kv_width = widths.get("a_transpose", (0,))[0], widths.get("b_transpose", (0, 0))[-1]
    ordinary, reuse = count_layers(list(tensors))
    if (width, kv_width) not in APPLE_HEADS:
        return None
    return AFMConfig(num_layers=ordinary + reuse, num_kv_reuse_layers=reuse)


def _read_package(path: Path) -> Adapter:
    metadata, geometry, tensors = read_fmadapter(path)
    base = AFMConfig(
        hidden_dim=geometry.hidden,
        num_layers=geometry.ordinary_layers + geometry.reuse_layers,
        num_kv_reuse_layers=geometry.reuse_layers,
        num_heads=geometry.heads,
        num_kv_heads=geometry.kv_heads,
        hidden_dim_scale_factor=geometry.feed_forward / geometry.hidden,
    )
    config = LoRAConfig(rank=metadata.rank, scale=DEFAULT_SCALE)
    # Adapters are float32 everywhere else; fp16 widens exactly.
    weights = {entry.ours: cast(tensors[entry.toolkit], "float32") for entry in adapter_entries(base, config)}
    prompts = _system_prompts(metadata.creator_defined.get(OURS), path / METADATA_FILE)
    return Adapter(config, base, weights, system_prompts=prompts)


def write_adapter_folder(folder: str | Path, adapter: Adapter) -> None:
    """Writes an MLX adapter folder; an older one is replaced as a whole, or not at all."""
    folder = to_path(folder)
    values = to_adapter_json(adapter.config, adapter.require_base(), adapter.name, adapter.system_prompts)
    with atomic_folder(folder) as partial:
        write_adapter_weights(partial / WEIGHTS, adapter.weights)
        write_json(partial / CONFIG, values)


def write_adapter_weights(path: str | Path, weights: Mapping[str, LazyTensor]) -> None:
    """Writes an `adapters.safetensors` atomically."""
    path = to_path(path)
    write_safetensors(path, weights, {"format": "mlx"})


def is_zero(adapter: Adapter) -> bool:
    """Whether the adapter changes nothing: a LoRA adapter whose every B is zero."""
    if adapter.config.fine_tune_type != "lora":
        return False
    return not any(np.any(tensor.read_values()) for name, tensor in adapter.weights.items() if name.endswith(".lora_b"))
