"""Adapters on a model: put on, taken off, read out, merged. One adapter at a time."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_afm.adapters.config import LoRAConfig
from mlx_afm.checkpoints.names import PROJECTIONS, Projection, target_of
from mlx_afm.errors import AdapterError
from mlx_afm.model import Model
from mlx_afm.model.lora import LoRAFusedLinear, LoRALinear
from mlx_afm.tree import require_same_tensors

LORA_LAYERS = (LoRALinear, LoRAFusedLinear)


def add_adapter(model: Model, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freezes the model and puts a new adapter on it: A random, B zero, so that nothing changes yet.

    Args:
        model: changed in place; its base weights are frozen.
        config: form of the adapter, which is trainable.
        seed: of the start values of A.

    Raises:
        AdapterError: the model has an adapter already.
    """
    if has_adapter(model):
        raise AdapterError("the model has an adapter already", advice="Remove or fuse it first.")
    model.freeze()
    places = [
        (f"{prefix}.{index}.{projection.ours}", projection)
        for prefix, layers in (
            ("model.layers", model.model.layers),
            ("model.kv_reuse_layers", model.model.kv_reuse_layers),
        )
        for index in range(len(layers))
        for projection in PROJECTIONS
    ]
    modules = dict(model.named_modules())
    keys = mx.random.split(mx.random.key(seed), len(places))
    adapted = [
        (name, _adapted(modules[name], projection, config, key))
        for (name, projection), key in zip(places, keys)
        if name in modules and set(projection.target) & set(config.targets)
    ]
    model.update_modules(tree_unflatten(adapted))
    train_only(model, config.targets)


def _adapted(module: nn.Module, projection: Projection, config: LoRAConfig, key: mx.array) -> nn.Module:
    parts = tuple(target for target in projection.target if target in config.targets)
    extra = {"parts": parts} if len(projection.target) > 1 else {}
    return module.to_lora(r=config.rank, scale=config.scale, dropout=config.dropout, key=key, **extra)


def train_only(model: Model, targets: tuple[str, ...]) -> None:
    """Freezes everything but the adapter matrices of some projections."""
    model.freeze()
    modules = dict(model.named_modules())
    for name in adapter_weights(model):
        if target_of(name) in targets:
            modules[name.rsplit(".", 1)[0]].unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def has_adapter(model: Model) -> bool:
    """Whether an adapter is on the model."""
    return any(isinstance(module, LORA_LAYERS) for module in model.modules())


def remove_adapter(model: Model) -> None:
    """Takes the adapter off; the base weights are as they were."""
    _replace(model, lambda module: module.linear)


def fuse_adapter(model: Model) -> None:
    """Adds the adapter to the weights (in float32, rounded once to their dtype) and takes it off."""
    _replace(model, lambda module: module.fuse())


def _replace(model: Model, make: object) -> None:
    replaced = [(name, make(module)) for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]  # type: ignore[operator]
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def adapter_weights(model: Model) -> dict[str, mx.array]:
    """The adapter's arrays by name: `...lora_a` (in, R), `...lora_b` (R, out), float32."""
    return {name: array for name, array in tree_flatten(model.parameters()) if name.endswith((".lora_a", ".lora_b"))}


def set_adapter_weights(model: Model, weights: Mapping[str, mx.array], *, where: object) -> None:
    """Gives the adapter on the model other values.

    Raises:
        TensorsError: names or shapes that are not the adapter's; all of them in one error.
    """
    expected = {name: tuple(array.shape) for name, array in adapter_weights(model).items()}
    found = {name: tuple(array.shape) for name, array in weights.items()}
    advice = "Was this adapter trained for another base model, or with other settings?"
    require_same_tensors(expected, found, where=where, advice=advice)
    model.load_weights([(name, array.astype(mx.float32)) for name, array in weights.items()], strict=False)
