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
    from mlx_afm.adapters.device_form import FormChange
    from mlx_afm.data import DataConfig
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
    from mlx_afm.formats.fmadapter_metadata import Metadata
    from mlx_afm.formats.fmadapter_plan import Rounding
    from mlx_afm.formats.fmadapter_report import PackageReport
    from mlx_afm.formats.tensors import LazyTensor
    from mlx_afm.generation import GenerateConfig, PrefixCache, batch_generate, generate, stream_generate
    from mlx_afm.generation.answers import Answer
    from mlx_afm.generation.generate import GenerationResponse
    from mlx_afm.generation.speculation import Speculation
    from mlx_afm.interop import register
    from mlx_afm.model import Model
    from mlx_afm.model_folder import ModelFolder
    from mlx_afm.quant import QuantConfig
    from mlx_afm.quant.residual import InitConfig
    from mlx_afm.runs.job import LoRAJob
    from mlx_afm.text.response_format import response_format
    from mlx_afm.text.tokenizer import AFMTokenizer
    from mlx_afm.training import Callback, TrainConfig
    from mlx_afm.workflows.cache import CacheEntry, clear_cache, list_cache
    from mlx_afm.workflows.calibrate import Calibration
    from mlx_afm.workflows.check import CheckConfig, check_package
    from mlx_afm.workflows.convert import Converted, convert
    from mlx_afm.workflows.export import ExportConfig, Exported, convert_adapter, export_fmadapter, export_package
    from mlx_afm.workflows.fuse import Fused, fuse
    from mlx_afm.workflows.inspect import inspect
    from mlx_afm.workflows.load import load
    from mlx_afm.workflows.logit_change import LogitChange
    from mlx_afm.workflows.lora import Objective, Score, Trained, score, train
    from mlx_afm.workflows.plot import plot
    from mlx_afm.workflows.recover import Recovered, RecoverJob, recover

_HOMES = {
    "AFMError": "errors",
    "AFMTokenizer": "text.tokenizer",
    "AdapterError": "errors",
    "Answer": "generation.answers",
    "CacheEntry": "workflows.cache",
    "Calibration": "workflows.calibrate",
    "Callback": "training",
    "CheckConfig": "workflows.check",
    "ConfigError": "errors",
    "Converted": "workflows.convert",
    "DataConfig": "data",
    "DataError": "errors",
    "DiskFullError": "errors",
    "DistributedError": "errors",
    "ExportConfig": "workflows.export",
    "Exported": "workflows.export",
    "FormChange": "adapters.device_form",
    "FormatError": "errors",
    "Fused": "workflows.fuse",
    "GenerateConfig": "generation",
    "GenerationResponse": "generation.generate",
    "InitConfig": "quant.residual",
    "LazyTensor": "formats.tensors",
    "LoRAConfig": "adapters",
    "LoRAJob": "runs.job",
    "LogitChange": "workflows.logit_change",
    "Metadata": "formats.fmadapter_metadata",
    "MissingDependencyError": "errors",
    "Model": "model",
    "ModelFolder": "model_folder",
    "Objective": "workflows.lora",
    "PackageReport": "formats.fmadapter_report",
    "PrefixCache": "generation",
    "QuantConfig": "quant",
    "RecoverJob": "workflows.recover",
    "Recovered": "workflows.recover",
    "Rounding": "formats.fmadapter_plan",
    "Score": "workflows.lora",
    "SettingError": "errors",
    "Speculation": "generation.speculation",
    "TensorsError": "errors",
    "TrainConfig": "training",
    "Trained": "workflows.lora",
    "batch_generate": "generation",
    "check_fmadapter": "formats.fmadapter_check",
    "check_package": "workflows.check",
    "clear_cache": "workflows.cache",
    "convert": "workflows.convert",
    "convert_adapter": "workflows.export",
    "export_fmadapter": "workflows.export",
    "export_package": "workflows.export",
    "fuse": "workflows.fuse",
    "generate": "generation",
    "inspect": "workflows.inspect",
    "list_cache": "workflows.cache",
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
    "AFMTokenizer",
    "AdapterError",
    "Answer",
    "CacheEntry",
    "Calibration",
    "Callback",
    "CheckConfig",
    "ConfigError",
    "Converted",
    "DataConfig",
    "DataError",
    "DiskFullError",
    "DistributedError",
    "ExportConfig",
    "Exported",
    "FormChange",
    "FormatError",
    "Fused",
    "GenerateConfig",
    "GenerationResponse",
    "InitConfig",
    "LazyTensor",
    "LoRAConfig",
    "LoRAJob",
    "LogitChange",
    "Metadata",
    "MissingDependencyError",
    "Model",
    "ModelFolder",
    "Objective",
    "PackageReport",
    "PrefixCache",
    "QuantConfig",
    "RecoverJob",
    "Recovered",
    "Rounding",
    "Score",
    "SettingError",
    "Speculation",
    "TensorsError",
    "TrainConfig",
    "Trained",
    "__version__",
    "batch_generate",
    "check_fmadapter",
    "check_package",
    "clear_cache",
    "convert",
    "convert_adapter",
    "export_fmadapter",
    "export_package",
    "fuse",
    "generate",
    "inspect",
    "list_cache",
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
