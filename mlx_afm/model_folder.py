"""An opened model folder: one object that reads each file once and is passed on.

    folder = ModelFolder("afm-mlx")
    folder.config, folder.schemes, folder.tokenizer      read when first asked for, then kept
    model = folder.load_model()
    adapter = folder.open_adapter("my.fmadapter")        checked against this model

The layout is described in `checkpoints/mlx_checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_afm.adapters import Adapter, attach_adapter, is_zero, read_adapter, read_system_prompts
from mlx_afm.checkpoints.hub import resolve
from mlx_afm.checkpoints.mlx_checkpoint import (
    BASE_ADAPTER,
    KEPT_KEYS,
    OBSERVERS,
    QUANTIZATION_KEYS,
    TOKENIZER,
    TOOLKIT_CONFIG,
    load_weights,
    parse_config,
    read_config_json,
)
from mlx_afm.checkpoints.quantized import schemes_of
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import OpenFiles, fingerprint_of_files, to_path, visible
from mlx_afm.formats.mlx_folder import read_shards
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model import AFMConfig, Model, ToolkitConfig, parse_toolkit_config
from mlx_afm.quant import Scheme
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS, SystemPrompts, parse_system_prompts
from mlx_afm.text.tokenizer import AFMTokenizer


class ModelFolder:
    """An MLX model folder. Properties are read when first asked for; what they raise stands with each of them.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a folder, or the hub id of one, which is downloaded.

        Raises:
            FormatError, ConfigError: no folder, and no id of one.
        """
        self.path = resolve(path)
        self._files = OpenFiles()

    @cached_property
    def config_json(self) -> Mapping[str, Any]:
        """The content of `config.json`. Raises FormatError: not a model folder."""
        return read_config_json(self.path, self._files)

    @cached_property
    def config(self) -> AFMConfig:
        """The sizes of the model. Raises ConfigError: not an AFM text v7 model."""
        return parse_config(self.config_json, where=self.path / "config.json")

    @property
    def kept_settings(self) -> dict[str, Any]:
        """What `config.json` says beside the architecture and must go where the model goes."""
        return {key: self.config_json[key] for key in KEPT_KEYS if key in self.config_json}

    @property
    def quantization_settings(self) -> dict[str, Any]:
        """What `config.json` says of quantized weights, unchanged."""
        return {key: self.config_json[key] for key in QUANTIZATION_KEYS if key in self.config_json}

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """All weights, memory-mapped. Raises FormatError: no weights, or a damaged file."""
        return read_shards(self.path, self._files)

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """How each quantized module is quantized, by module path; empty if the model is dense.

        Raises:
            ConfigError: quantized weights that `config.json` does not describe, or in an unknown way.
        """
        return schemes_of(self.config_json, self.tensors, where=self.path / "config.json")

    @cached_property
    def toolkit_config(self) -> ToolkitConfig:
        """The toolkit's configuration the folder came from, or one made from its `config.json`."""
        if (self.path / TOOLKIT_CONFIG).is_file():
            values = self._files.read_json(self.path / TOOLKIT_CONFIG)
            return parse_toolkit_config(values, where=self.path / TOOLKIT_CONFIG)
        return ToolkitConfig(model=self.config, adapter=None)

    @cached_property
    def observers(self) -> Mapping[str, LazyTensor]:
        """The observers' tensors by the toolkit's names; none if the folder never was a toolkit checkpoint."""
        file = self.path / OBSERVERS
        return read_safetensors(file, self._files) if file.is_file() else {}

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer's file, or None."""
        file = self.path / TOKENIZER
        return file if file.is_file() else None

    @cached_property
    def tokenizer(self) -> AFMTokenizer | None:
        """The tokenizer, or None if the folder has none.

        Raises:
            ConfigError: it has more pieces than the model has tokens. FormatError: no tokenizer.
        """
        file = self.tokenizer_file
        if file is None:
            return None
        tokenizer = AFMTokenizer.from_bytes(bytes(self._files.read(file)), file)
        if (self.path / "config.json").is_file() and tokenizer.vocab_size > self.config.vocab_size:
            advice = "Use the tokenizer.model that came with the model."
            expected, found = f"at most the {self.config.vocab_size} tokens of the model", tokenizer.vocab_size
            what = "the tokenizer is another model's"
            raise ConfigError(what, where=file, expected=expected, found=f"{found} pieces", advice=advice)
        return tokenizer

    def require_tokenizer(self) -> AFMTokenizer:
        """The tokenizer of a folder that holds a model.

        Raises:
            ConfigError: the folder has none, it is another model's, or the model is not AFM text v7.
            FormatError: a damaged tokenizer, or no model folder.
        """
        _ = self.config  # first: that a folder holds no model at all is the better message
        tokenizer = self.tokenizer
        if tokenizer is None:
            advice = "Convert again with tokenizer.model in place."
            raise ConfigError("the model folder has no tokenizer", where=self.path, advice=advice)
        return tokenizer

    @cached_property
    def base_adapter(self) -> Adapter | None:
        """The adapter that `base-model.pt` itself held, or None."""
        path = self.path / BASE_ADAPTER
        return self._read_adapter(path, self._files) if path.is_dir() else None

    @cached_property
    def active_base_adapter(self) -> Adapter | None:
        """The base adapter if it changes anything, or None."""
        adapter = self.base_adapter
        return None if adapter is None or is_zero(adapter) else adapter

    def open_adapter(self, path: str | Path) -> Adapter:
        """An adapter of any form that fits the model. It is read anew at every call.

        Raises:
            FormatError, AdapterError, TensorsError: see `read_adapter`.
        """
        return self._read_adapter(to_path(path), None)

    def _read_adapter(self, path: Path, files: OpenFiles | None) -> Adapter:
        spec = self.toolkit_config.adapter
        return read_adapter(path, self.config, spec.scale if spec else None, files)

    def system_prompts_of(self, adapter: Adapter | None) -> SystemPrompts:
        """The system prompts that an adapter was trained with; if it names none, those of what was fused in.

        Raises:
            FormatError: `config.json` names them in another form.
        """
        if adapter is not None and adapter.system_prompts:
            return adapter.system_prompts
        try:
            return parse_system_prompts(self.config_json.get(SYSTEM_PROMPTS))
        except ConfigError as error:
            raise FormatError(str(error), where=self.path / "config.json") from error

    def system_prompts_at(self, adapter_path: str | Path | None) -> SystemPrompts:
        """The same for the file or folder of an adapter, without reading its tensors.

        Raises:
            FormatError, AdapterError: see `read_system_prompts` and `system_prompts_of`.
        """
        named = () if adapter_path is None else read_system_prompts(adapter_path)
        return named or self.system_prompts_of(None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that names the model by its configuration, weights and base adapter."""
        files = [self.path / "config.json", *visible(self.path.glob("*.safetensors"))]
        files += [path for path in visible((self.path / BASE_ADAPTER).glob("*")) if path.is_file()]
        return fingerprint_of_files(files, self._files)

    def load_model(self, *, lazy: bool = False, layers: range | None = None) -> Model:
        """The model without any adapter; names and shapes are checked before a value is read.

        Args:
            lazy: leave the weights on disk until they are used.
            layers: those whose weights are wanted, None for all. The others stay on disk until they are used, and are
                not checked.

        Raises:
            FormatError, ConfigError: see `config` and `schemes`. TensorsError: weights of another model, or NaN or
                infinite ones, all named. With `lazy` dense matrices are not checked for these.

        Cost: the check is one pass over the weights in memory, some percent of the time to read them from disk.
        """
        return load_weights(self.path, self.config, self.schemes, self.tensors, lazy=lazy, layers=layers)

    def load_with(self, adapter: Adapter | None, *, where: object = None, lazy: bool = False) -> Model:
        """The model in evaluation mode with an adapter on it; None: with the active base adapter, if there is one.

        Args:
            adapter: from `open_adapter`.
            where: its path, for messages.
            lazy: see `load_model`.
        """
        model = self.load_model(lazy=lazy)
        if adapter is None:
            adapter, where = self.active_base_adapter, self.path / BASE_ADAPTER
        if adapter is not None:
            attach_adapter(model, adapter, where=where)
        model.eval()
        return model
