"""Load a model folder, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_afm.adapters import (
    Adapter,
    add_adapter,
    is_zero,
    read_adapter,
    set_adapter_weights,
    set_coded_weights,
    set_full_weights,
)
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.hub import resolve
from mlx_afm.checkpoints.model_folder import BASE_ADAPTER, load_model, read_config, read_toolkit_config
from mlx_afm.files import to_path
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer

TOKENIZER = "tokenizer.model"


def load(
    path: str | Path, adapter_path: str | Path | None = None, *, lazy: bool = False
) -> tuple[Model, AFMTokenizer | None]:
    """The model of an MLX folder and its tokenizer (None if the folder has none).

    Args:
        path: an MLX model folder, from `mlx-afm convert`, or the hub id of one.
        adapter_path: an MLX adapter folder, a toolkit `.pt` or a `.fmadapter`. It takes the place of
            the folder's own `base_adapter`, which otherwise is active if it changes anything.
        lazy: leave the weights on disk until they are used.

    Raises:
        FormatError, ConfigError, TensorsError: the folder cannot be read.
        AdapterError: an adapter for another model.
    """
    folder = resolve(path)
    model = load_model(folder, lazy=lazy)
    adapter = base_adapter(folder) if adapter_path is None else open_adapter(folder, adapter_path)
    if adapter is not None and (adapter_path is not None or not is_zero(adapter)):
        attach(model, adapter, where=adapter_path or folder / BASE_ADAPTER)
    return model, load_tokenizer(folder)


def load_tokenizer(folder: str | Path) -> AFMTokenizer | None:
    """The tokenizer of a model folder, or None if it has none."""
    folder = to_path(folder)
    file = folder / TOKENIZER
    return AFMTokenizer.from_file(file) if file.is_file() else None


def open_adapter(folder: str | Path, path: str | Path) -> Adapter:
    """An adapter of any form that fits the model in `folder`."""
    folder = to_path(folder)
    path = to_path(path)
    toolkit = read_toolkit_config(folder)
    scale = toolkit.adapter.scale if toolkit.adapter else None
    return read_adapter(path, read_config(folder), scale)


def base_adapter(folder: str | Path) -> Adapter | None:
    """The adapter that `base-model.pt` itself holds, or None."""
    folder = to_path(folder)
    path = folder / BASE_ADAPTER
    return open_adapter(folder, path) if path.is_dir() else None


def attach(model: Model, adapter: Adapter, *, where: object) -> None:
    """Puts an adapter on a model, values included.

    Weights of full fine-tuning take the model's dtype; those of quantisation-aware training become codes.
    """
    if adapter.config.fine_tune_type == "full":
        set_full_weights(model, {name: to_mlx(tensor) for name, tensor in adapter.weights.items()})
        mx.eval(model.parameters())
        return
    if adapter.config.fine_tune_type == "qat":
        set_coded_weights(model, {name: to_mlx(tensor) for name, tensor in adapter.weights.items()})
        mx.eval(model.parameters())
        return
    add_adapter(model, adapter.config)
    model.eval()  # the new layers too, or dropout would go on; training turns it on itself
    weights = {name: to_mlx(tensor).astype(mx.float32) for name, tensor in adapter.weights.items()}
    set_adapter_weights(model, weights, where=where)
    mx.eval(model.parameters())
