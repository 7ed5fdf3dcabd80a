"""mlx-afm: Apple's on-device foundation model (AFM text v7), native to MLX.

    model, tokenizer = mlx_afm.load("afm-mlx")
    text = mlx_afm.generate(model, tokenizer, "List the files in docs", max_tokens=64)

Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_afm._version import __version__

if TYPE_CHECKING:
    from mlx_afm.adapters import LoRAConfig
    from mlx_afm.errors import (
        AdapterError,
        AFMError,
        ConfigError,
        DataError,
        FormatError,
        MissingDependencyError,
        TensorsError,
    )
    from mlx_afm.formats.fmadapter_check import check_fmadapter
    from mlx_afm.generation import GenerateConfig, generate, stream_generate
    from mlx_afm.interop import register
    from mlx_afm.training import TrainConfig
    from mlx_afm.workflows.convert import convert
    from mlx_afm.workflows.export import convert_adapter, export_fmadapter
    from mlx_afm.workflows.fuse import fuse
    from mlx_afm.workflows.inspect import inspect
    from mlx_afm.workflows.load import load
    from mlx_afm.workflows.lora import LoRAJob, score, train

_HOMES = {
    "AFMError": "errors",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "FormatError": "errors",
    "GenerateConfig": "generation",
    "LoRAConfig": "adapters",
    "LoRAJob": "workflows.lora",
    "MissingDependencyError": "errors",
    "TensorsError": "errors",
    "TrainConfig": "training",
    "check_fmadapter": "formats.fmadapter_check",
    "convert": "workflows.convert",
    "convert_adapter": "workflows.export",
    "export_fmadapter": "workflows.export",
    "fuse": "workflows.fuse",
    "generate": "generation",
    "inspect": "workflows.inspect",
    "load": "workflows.load",
    "register": "interop",
    "score": "workflows.lora",
    "stream_generate": "generation",
    "train": "workflows.lora",
}

__all__ = [
    "AFMError",
    "AdapterError",
    "ConfigError",
    "DataError",
    "FormatError",
    "GenerateConfig",
    "LoRAConfig",
    "LoRAJob",
    "MissingDependencyError",
    "TensorsError",
    "TrainConfig",
    "__version__",
    "check_fmadapter",
    "convert",
    "convert_adapter",
    "export_fmadapter",
    "fuse",
    "generate",
    "inspect",
    "load",
    "register",
    "score",
    "stream_generate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mlx_afm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
