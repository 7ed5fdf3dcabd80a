"""Adapters: put on a model, taken off, merged, and kept on disk in three forms."""

from mlx_afm.adapters.attach import (
    adapter_weights,
    add_adapter,
    fuse_adapter,
    has_adapter,
    remove_adapter,
    set_adapter_weights,
    train_only,
)
from mlx_afm.adapters.config import LoRAConfig
from mlx_afm.adapters.store import (
    Adapter,
    adapter_shapes,
    is_zero,
    read_adapter,
    write_adapter_folder,
    write_adapter_package,
    write_adapter_pt,
    write_adapter_weights,
)

__all__ = [
    "Adapter",
    "LoRAConfig",
    "adapter_shapes",
    "adapter_weights",
    "add_adapter",
    "fuse_adapter",
    "has_adapter",
    "is_zero",
    "read_adapter",
    "remove_adapter",
    "set_adapter_weights",
    "train_only",
    "write_adapter_folder",
    "write_adapter_package",
    "write_adapter_pt",
    "write_adapter_weights",
]
