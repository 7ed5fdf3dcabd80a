"""Merge an adapter into the weights: a plain model folder that needs no adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.adapters import fuse_adapter, has_adapter
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.hub import resolve
from mlx_afm.checkpoints.model_folder import KEPT_FILES, OBSERVERS, kept_settings, write_config
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.files import atomic_folder
from mlx_afm.formats.mlx_folder import write_shards
from mlx_afm.workflows.load import load


def fuse(model_path: str | Path, adapter_path: str | Path | None, save_path: str | Path) -> Path:
    """Writes the model with the adapter added to its weights (in float32, rounded once to their dtype).

    Args:
        model_path: an MLX model folder.
        adapter_path: any of the three adapter forms; None fuses the folder's own `base_adapter`.
        save_path: the folder to write; it must not exist yet, or be empty.

    Raises:
        AdapterError: an adapter for another model, or nothing to fuse.
        ConfigError: a target in the way.
    """
    source, target = resolve(model_path), Path(save_path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("the target exists already", where=target, advice="Remove it or choose another --save-path.")
    model, _ = load(source, adapter_path)
    if not has_adapter(model):
        raise AdapterError("nothing to fuse", where=source, advice="Give --adapter-path.")
    fuse_adapter(model)
    mx.eval(model.parameters())
    with atomic_folder(target) as partial:
        tensors = {name: from_mlx(array) for name, array in tree_flatten(model.parameters())}
        write_shards(partial, tensors)
        # The base adapter and the toolkit's JSON, which names it, no longer hold.
        for name in (*KEPT_FILES, OBSERVERS):
            if (source / name).is_file():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, partial / name)
        write_config(partial, model.args, kept_settings(source))
    return target
