"""Adapters: put on a model, taken off, merged, and kept on disk in three forms."""

from mlx_afm.adapters.attach import (
    adapter_weights,
    add_adapter,
    attach_adapter,
    fuse_adapter,
    has_adapter,
    remove_adapter,
    restart_dead_components,
    set_adapter_weights,
    set_coded_weights,
    set_full_weights,
    train_only,
)
from mlx_afm.adapters.config import LoRAConfig
from mlx_afm.adapters.device_form import DeviceForm, FormChange, to_device_form
from mlx_afm.adapters.store import (
    Adapter,
    adapter_shapes,
    is_zero,
    read_adapter,
    read_system_prompts,
    write_adapter_folder,
    write_adapter_weights,
)
from mlx_afm.adapters.toolkit_forms import package_tensors, write_adapter_package, write_adapter_pt

__all__ = [
    "Adapter",
    "DeviceForm",
    "FormChange",
    "LoRAConfig",
    "adapter_shapes",
    "adapter_weights",
    "add_adapter",
    "attach_adapter",
    "fuse_adapter",
    "has_adapter",
    "is_zero",
    "package_tensors",
    "read_adapter",
    "read_system_prompts",
    "remove_adapter",
    "restart_dead_components",
    "set_adapter_weights",
    "set_coded_weights",
    "set_full_weights",
    "to_device_form",
    "train_only",
    "write_adapter_folder",
    "write_adapter_package",
    "write_adapter_pt",
    "write_adapter_weights",
]
