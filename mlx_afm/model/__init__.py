"""AFM text v7 in `mlx.nn`: the architecture and nothing else."""

from mlx_afm.model.attention_context import KeyIndices, Packing
from mlx_afm.model.cache import KVCache
from mlx_afm.model.config import AFMConfig
from mlx_afm.model.model import Activations, Model
from mlx_afm.model.toolkit_config import AdapterSpec, ToolkitConfig, parse_toolkit_config, to_toolkit_config

ModelArgs = AFMConfig  # mlx-lm's name, for the `model_file` shim

__all__ = [
    "AFMConfig",
    "Activations",
    "AdapterSpec",
    "KVCache",
    "KeyIndices",
    "Model",
    "ModelArgs",
    "Packing",
    "ToolkitConfig",
    "parse_toolkit_config",
    "to_toolkit_config",
]
