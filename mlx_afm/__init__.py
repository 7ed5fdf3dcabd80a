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
        DiskFullError,
        DistributedError,
        FormatError,
        MissingDependencyError,
        SettingError,
        TensorsError,
    )
    from mlx_afm.formats.fmadapter_check import check_fmadapter
    from mlx_afm.generation import GenerateConfig, PrefixCache, batch_generate, generate, stream_generate
    from mlx_afm.interop import register
    from mlx_afm.quant.residual import InitConfig
    from mlx_afm.runs.job import LoRAJob
    from mlx_afm.text.response_format import response_format
    from mlx_afm.training import Callback, TrainConfig
    from mlx_afm.workflows.calibrate import Calibration
    from mlx_afm.workflows.check import CheckConfig, check_package
    from mlx_afm.workflows.convert import convert
    from mlx_afm.workflows.export import ExportConfig, Exported, convert_adapter, export_fmadapter, export_package
    from mlx_afm.workflows.fuse import fuse
    from mlx_afm.workflows.inspect import inspect
    from mlx_afm.workflows.load import load
    from mlx_afm.workflows.lora import score, train
    from mlx_afm.workflows.plot import plot
    from mlx_afm.workflows.recover import RecoverJob, recover

_HOMES = {
    "AFMError": "errors",
    "AdapterError": "errors",
    "Calibration": "workflows.calibrate",
    "Callback": "training",
    "CheckConfig": "workflows.check",
    "ConfigError": "errors",
    "DataError": "errors",
    "DiskFullError": "errors",
    "DistributedError": "errors",
    "ExportConfig": "workflows.export",
    "Exported": "workflows.export",
    "FormatError": "errors",
    "GenerateConfig": "generation",
    "InitConfig": "quant.residual",
    "LoRAConfig": "adapters",
    "LoRAJob": "runs.job",
    "MissingDependencyError": "errors",
    "PrefixCache": "generation",
    "RecoverJob": "workflows.recover",
    "SettingError": "errors",
    "TensorsError": "errors",
    "TrainConfig": "training",
    "batch_generate": "generation",
    "check_fmadapter": "formats.fmadapter_check",
    "check_package": "workflows.check",
    "convert": "workflows.convert",
    "convert_adapter": "workflows.export",
    "export_fmadapter": "workflows.export",
    "export_package": "workflows.export",
    "fuse": "workflows.fuse",
    "generate": "generation",
    "inspect": "workflows.inspect",
    "load": "workflows.load",
    "plot": "workflows.plot",
    "recover": "workflows.recover",
    "register": "interop",
    "response_format": "text.response_format",
    "score": "workflows.lora",
    "stream_generate": "generation",
    "train": "workflows.lora",
}

__all__ = [
    "AFMError",
    "AdapterError",
    "Calibration",
    "Callback",
    "CheckConfig",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "DistributedError",
    "ExportConfig",
    "Exported",
    "FormatError",
    "GenerateConfig",
    "InitConfig",
    "LoRAConfig",
    "LoRAJob",
    "MissingDependencyError",
    "PrefixCache",
    "RecoverJob",
    "SettingError",
    "TensorsError",
    "TrainConfig",
    "__version__",
    "batch_generate",
    "check_fmadapter",
    "check_package",
    "convert",
    "convert_adapter",
    "export_fmadapter",
    "export_package",
    "fuse",
    "generate",
    "inspect",
    "load",
    "plot",
    "recover",
    "register",
    "response_format",
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
