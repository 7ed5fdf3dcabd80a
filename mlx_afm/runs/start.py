"""What training starts from: a new adapter, the base model's own, any other adapter, or the whole model."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.adapters import (
    Adapter,
    LoRAConfig,
    adapter_weights,
    add_adapter,
    restart_dead_components,
    set_adapter_weights,
    train_only,
)
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.adapters.layers import ALL
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.mlx_checkpoint import BASE_ADAPTER
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.model import Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.training import Callback, Notice
from mlx_afm.training.hooks import ignore


def start_adapter(
    model: Model,
    folder: ModelFolder,
    lora: LoRAConfig,
    *,
    seed: int,
    adapter_file: Path | None = None,
    on_event: Callback = ignore,
) -> LoRAConfig:
    """Puts the adapter to be trained on the model and freezes the rest; returns its full form.

    Without `adapter_file`: if the base carries an adapter of the same rank and scale, training starts
    from its values and untrained projections keep theirs. If it does something and has another form,
    training is refused, since it is part of the base model. Where A and B of a trained module are both zero, A gets
    new random values: such a pair would never learn.

    Args:
        model: changed in place.
        folder: from which it was loaded.
        lora: the form wanted.
        seed: of new values.
        adapter_file: an adapter of any form; it takes the place of the base's own, and training starts
            from its values. Its counters do not matter: this is a new run.
        on_event: told how many modules got new values of A.

    Raises:
        ConfigError: a form that cannot go on from what is there. AdapterError: an adapter of another model.
    """
    if adapter_file is not None:
        adapter = folder.open_adapter(adapter_file)
        return _start_from(model, adapter, lora, seed=seed, where=adapter_file, on_event=on_event)
    base = folder.base_adapter
    if base is None or not takes_base_adapter(folder, lora):
        if base is not None and folder.active_base_adapter is not None:
            raise ConfigError(
                "the base model has an active adapter",
                where=folder.path,
                expected=_form(base.config),
                found=_form(lora),
                advice=f"Train in its form (--fine-tune-type lora {_flags(base.config)}), or {_fuse_advice(folder)}",
            )
        add_adapter(model, lora, seed=seed)
        mx.eval(adapter_weights(model))
        return lora
    form = LoRAConfig(rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
    add_adapter(model, form, seed=seed)
    _set_values(model, base, lora, seed=seed, where=folder.path / BASE_ADAPTER, on_event=on_event)
    return form


def takes_base_adapter(folder: ModelFolder, lora: LoRAConfig) -> bool:
    """Whether training starts from the base model's own adapter: it has one, in the form wanted."""
    base = folder.base_adapter
    wanted = (lora.fine_tune_type, lora.rank, lora.scale)
    return base is not None and ("lora", base.config.rank, base.config.scale) == wanted


def _set_values(
    model: Model, adapter: Adapter, lora: LoRAConfig, *, seed: int, where: Path, on_event: Callback
) -> None:
    """Gives the new adapter on the model the values of another, and makes the projections to be trained trainable."""
    fresh = adapter_weights(model)
    given = {name: to_mlx(tensor).astype(mx.float32) for name, tensor in adapter.weights.items()}
    set_adapter_weights(model, {**fresh, **given}, where=where)
    train_only(model, lora.targets, lora.layers)
    trained = dict(tree_flatten(model.trainable_parameters()))
    started, restarted = restart_dead_components(trained, fresh)
    model.load_weights(list(started.items()), strict=False)
    mx.eval(adapter_weights(model))
    if restarted:
        modules = sum(name.endswith(".lora_a") for name in trained)
        count = f"{len(restarted)} of {modules} trained adapter modules"
        zero = f"{count} have rank components in which A and B are both zero, so they could not learn"
        on_event(Notice(text=f"{zero}: A starts with random values there (seed {seed})"))


def _flags(config: LoRAConfig) -> str:
    return f"--rank {config.rank} --scale {config.scale!r}"


def _fuse_advice(folder: ModelFolder) -> str:
    """What makes a base adapter part of the weights; codes must become dense for that."""
    dense = " --dequantize" if folder.schemes else ""
    return (
        f"fuse it into the weights first: mlx-afm fuse --model {shlex.quote(str(folder.path))}{dense} --save-path FUSED"
    )


def _form(config: LoRAConfig) -> str:
    kind = "" if config.fine_tune_type == "lora" else f"{config.fine_tune_type} "
    return f"{kind}rank {config.rank}, scale {config.scale}"


def _start_from(
    model: Model, adapter: Adapter, lora: LoRAConfig, *, seed: int, where: Path, on_event: Callback
) -> LoRAConfig:
    """Starts from an adapter's values; what it has and is not trained stays, what it lacks is new."""
    given, whole = adapter.config, lora.fine_tune_type in WHOLE_WEIGHTS
    same = given.fine_tune_type == lora.fine_tune_type
    if not same or (not whole and (given.rank, given.scale) != (lora.rank, lora.scale)):
        kind = given.fine_tune_type
        advice = f"Give its form: --fine-tune-type {kind}" + ("" if kind in WHOLE_WEIGHTS else f" {_flags(given)}")
        expected = kind if whole or kind in WHOLE_WEIGHTS else _form(given)
        raise ConfigError(
            "the adapter to start from has another form",
            where=where,
            expected=expected,
            found=lora.fine_tune_type if whole else _form(lora),
            advice=advice,
        )
    if whole:
        return _start_from_whole(model, adapter, lora, where=where)
    targets = tuple(target for target in LoRAConfig().targets if target in {*given.targets, *lora.targets})
    layers = lora.layers if given.layers == lora.layers else ALL
    form = replace(lora, targets=targets, layers=layers)
    add_adapter(model, form, seed=seed)
    _set_values(model, adapter, lora, seed=seed, where=where, on_event=on_event)
    return form


def _start_from_whole(model: Model, adapter: Adapter, lora: LoRAConfig, *, where: Path) -> LoRAConfig:
    add_adapter(model, lora)
    missing = sorted(set(adapter.weights) - set(adapter_weights(model)))
    if missing:  # frozen tensors would not be saved
        advice = f"Train at least its layers: --layers {adapter.config.layers}"
        raise AdapterError("the adapter changes more than would be trained", where=where, advice=advice)
    model.load_weights(
        [(name, to_mlx(tensor).astype(mx.float32)) for name, tensor in adapter.weights.items()], strict=False
    )
    mx.eval(adapter_weights(model))
    return lora
