"""Adapters on a model: put on, taken off, read out, merged. One adapter at a time.

Full fine-tuning has no layers of its own: its weights are the model's, held in float32 while they are trained. What
quantization-aware training leaves are the weights and scales that codes are made of.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_afm.adapters.config import WHOLE_WEIGHTS, LoRAConfig
from mlx_afm.adapters.layers import ALL, chosen_layers, coded_projections
from mlx_afm.adapters.store import Adapter
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.names import PROJECTIONS, Projection, layer_of, target_of
from mlx_afm.errors import AdapterError
from mlx_afm.model import Model
from mlx_afm.model.dora import DoRAFusedLinear, DoRALinear
from mlx_afm.model.lora import LoRAFusedLinear, LoRALinear
from mlx_afm.model.projections import dequantize_modules, is_quantized
from mlx_afm.model.qat import put_codes, start_qat
from mlx_afm.tree import require_same_tensors

LORA_LAYERS = (LoRALinear, LoRAFusedLinear, DoRALinear, DoRAFusedLinear)
ARRAYS = ("lora_a", "lora_b", "m")  # of an adapted layer, the last of DoRA's alone
ENDINGS = tuple(f".{name}" for name in ARRAYS)
QUANTIZER_STEPS = ("quant_key_scale", "quant_value_scale")  # measured, not learnt


def add_adapter(model: Model, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freezes the model and puts a new adapter on it: A random, B zero, so that nothing changes yet.

    Args:
        model: changed in place; its base weights are frozen.
        config: form of the adapter, which is trainable. Full fine-tuning and qat make the whole model float32.
        seed: of the start values of A.

    Raises:
        AdapterError: the model has an adapter already, or codes that full fine-tuning would have to change.
        ConfigError: layers it does not have, or qat of matrices that codes do not fill.
    """
    if has_adapter(model):
        raise AdapterError("the model has an adapter already", advice="Remove or fuse it first.")
    if config.fine_tune_type in WHOLE_WEIGHTS:
        _require_dense(model, config.fine_tune_type)
    if config.fine_tune_type == "qat":
        start_qat(model, coded_projections(config.layers, config.targets, model.args))
        return
    layers = chosen_layers(config.layers, model.args)
    model.freeze()
    if config.fine_tune_type == "full":
        _train_whole_layers(model, layers, everything=config.layers == ALL)
        return
    places = [
        (f"{prefix}.{index}.{projection.ours}", projection)
        for prefix, count in (
            ("model.layers", len(model.model.layers)),
            ("model.kv_reuse_layers", len(model.model.kv_reuse_layers)),
        )
        for index in range(count)
        for projection in PROJECTIONS
    ]
    modules = dict(model.named_modules())
    keys = mx.random.split(mx.random.key(seed), len(places))
    adapted = [
        (name, _adapted(modules[name], projection, config, key))
        for (name, projection), key in zip(places, keys)
        if name in modules
        and set(projection.target) & set(config.targets)
        and layer_of(f"{name}.", model.args) in layers
    ]
    model.update_modules(tree_unflatten(adapted))
    train_only(model, config.targets, config.layers)


def _require_dense(model: Model, kind: str) -> None:
    if is_quantized(model):
        advice = "Make it dense first (mlx-afm convert -d), or use a low-rank adapter."
        what = {"full": "full fine-tuning", "qat": "quantization-aware training"}[kind]
        raise AdapterError(f"{what} of a quantized model", expected="dense weights", advice=advice)


def _adapted(module: nn.Module, projection: Projection, config: LoRAConfig, key: mx.array) -> nn.Module:
    parts = tuple(target for target in projection.target if target in config.targets)
    extra = {"parts": parts} if len(projection.target) > 1 else {}
    if config.fine_tune_type == "dora":
        layer = DoRAFusedLinear if extra else DoRALinear
        return layer(module, config.rank, scale=config.scale, dropout=config.dropout, key=key, **extra)
    return module.to_lora(r=config.rank, scale=config.scale, dropout=config.dropout, key=key, **extra)


def _train_whole_layers(model: Model, layers: frozenset[int], *, everything: bool) -> None:
    """Makes whole layers trainable, in float32, and with all of them the embedding and the last norm."""
    model.apply(lambda array: array.astype(mx.float32))
    if everything:
        model.unfreeze()
    for number, layer in enumerate(model.layers):
        if number in layers:
            layer.unfreeze()
    model.freeze(keys=list(QUANTIZER_STEPS))


def train_only(model: Model, targets: tuple[str, ...], layers: str = ALL) -> None:
    """Freezes everything but the adapter's arrays of some projections of some layers."""
    model.freeze()
    modules, chosen = dict(model.named_modules()), chosen_layers(layers, model.args)
    for name in adapter_weights(model):
        if target_of(name) in targets and layer_of(name, model.args) in chosen:
            modules[name.rsplit(".", 1)[0]].unfreeze(keys=list(ARRAYS), recurse=False)


def has_adapter(model: Model) -> bool:
    """Whether an adapter is on the model."""
    return any(isinstance(module, LORA_LAYERS) for module in model.modules())


def remove_adapter(model: Model) -> None:
    """Takes the adapter off; the base weights are as they were."""
    _replace(model, lambda module: module.linear)


def fuse_adapter(model: Model, *, dequantize: bool = False) -> None:
    """Adds the adapter to the weights (in float32, rounded once to their dtype) and takes it off.

    Args:
        model: changed in place.
        dequantize: make all codes dense. Without it codes are never touched, so an adapter on them is refused.

    Raises:
        AdapterError: it sits on codes.
    """
    _replace(model, lambda module: module.fuse(dequantize))
    if dequantize:
        dequantize_modules(model)


def _replace(model: Model, make: object) -> None:
    replaced = [(name, make(module)) for name, module in model.named_modules() if isinstance(module, LORA_LAYERS)]  # type: ignore[operator]
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def adapter_weights(model: Model) -> dict[str, mx.array]:
    """The adapter's arrays by name: `...lora_a` (in, R), `...lora_b` (R, out), DoRA's `...m` (out,), float32.

    Of a model that is fine-tuned as a whole, the trainable weights.
    """
    if not has_adapter(model):
        return dict(tree_flatten(model.trainable_parameters()))
    return {name: array for name, array in tree_flatten(model.parameters()) if name.endswith(ENDINGS)}


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


def restart_dead_components(
    weights: Mapping[str, mx.array], fresh: Mapping[str, mx.array]
) -> tuple[dict[str, mx.array], list[str]]:
    """The adapter's arrays with new values of A where a pair could never learn, and the modules this concerns.

    A component of the rank whose column of A and whose row of B are both zero has zero gradients for ever: each is
    multiplied by the other. With a random column of A and a row of zeros in B the pair still changes nothing, and it
    learns.

    Args:
        weights: `...lora_a` (in, R) and `...lora_b` (R, out) by name; others are passed on.
        fresh: a start value of each `...lora_a`, same shape.

    Example: A = 0 and B = 0, rank 2, as `export --zero-untrained` writes them -> A = fresh A, B = 0.
    """
    dead = {}
    for name, a_NR in weights.items():
        if name.endswith(".lora_a"):
            b_RO = weights[name.removesuffix("lora_a") + "lora_b"]
            dead[name] = (a_NR == 0).all(axis=0) & (b_RO == 0).all(axis=1)
    found = {name: mask_R.any() for name, mask_R in dead.items()}
    mx.eval(found)
    names = [name for name, any_dead in found.items() if any_dead.item()]
    changed = {name: mx.where(dead[name], fresh[name], weights[name]) for name in names}
    return {**weights, **changed}, [name.removesuffix(".lora_a") for name in names]


def set_full_weights(model: Model, weights: Mapping[str, mx.array]) -> None:
    """Puts weights of full fine-tuning in place, rounded once to the dtype of those they replace.

    Raises:
        AdapterError: those they replace are codes.
    """
    _require_dense(model, "full")
    dtypes = {name: array.dtype for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, array.astype(dtypes[name])) for name, array in weights.items()], strict=False)


def set_coded_weights(model: Model, weights: Mapping[str, mx.array]) -> None:
    """Puts what quantization-aware training left in place, quantized, and the embedding in 4 bits.

    Raises:
        AdapterError: the model is quantized already.
    """
    _require_dense(model, "qat")
    put_codes(model, weights)


def attach_adapter(model: Model, adapter: Adapter, *, where: object) -> None:
    """Puts an adapter on a model, values included.

    Weights of full fine-tuning take the model's dtype; those of quantization-aware training are quantized.

    Args:
        model: changed in place.
        adapter: of any kind; it fits the model.
        where: its path, for messages.
    """
    values = {name: to_mlx(tensor) for name, tensor in adapter.weights.items()}
    if adapter.config.fine_tune_type == "full":
        set_full_weights(model, values)
    elif adapter.config.fine_tune_type == "qat":
        set_coded_weights(model, values)
    else:
        add_adapter(model, adapter.config)
        model.eval()  # the new layers too, or dropout would go on; training turns it on itself
        set_adapter_weights(model, {name: value.astype(mx.float32) for name, value in values.items()}, where=where)
    mx.eval(model.parameters())
