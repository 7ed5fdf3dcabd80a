"""Load a model folder, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_afm.adapters import (
    Adapter,
    add_adapter,
    is_zero,
    read_adapter,
    read_system_prompts,
    set_adapter_weights,
    set_coded_weights,
    set_full_weights,
)
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.hub import resolve
from mlx_afm.checkpoints.model_folder import BASE_ADAPTER, kept_settings, load_model, read_config, read_toolkit_config
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import to_path
from mlx_afm.folders import OnNote, ignore_note
from mlx_afm.model import Model
from mlx_afm.text.system_prompt import (
    SYSTEM_PROMPTS,
    SystemPrompts,
    default_system_prompt,
    parse_system_prompt,
    parse_system_prompts,
    system_prompt_notice,
)
from mlx_afm.text.tokenizer import AFMTokenizer

TOKENIZER = "tokenizer.model"


def load(
    path: str | Path, adapter_path: str | Path | None = None, *, lazy: bool = False
) -> tuple[Model, AFMTokenizer | None]:
    """The model of an MLX folder, in evaluation mode as mlx-lm's, and its tokenizer (None if the folder has none).

    If the adapter, or a folder into which one was fused, names the one system prompt that it was trained with, prompts
    without a system message get this one (`tokenizer.system_prompt`).

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
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        trained_with = system_prompts_of(folder, None if adapter_path is None else adapter)
        tokenizer.system_prompt = default_system_prompt(trained_with)
    model.eval()
    return model, tokenizer


def load_for_answers(
    path: str | Path,
    adapter_path: Path | None,
    system: str | None = None,
    on_note: OnNote = ignore_note,
) -> tuple[Model, AFMTokenizer]:
    """Model and tokenizer to answer with, and the system prompt of the answers decided.

    Args:
        path, adapter_path: see `load`.
        system: system prompt of conversations without a system message; "" for no system turn, None for what `load`
            finds.
        on_note: told if the adapter leaves the choice open.

    Raises:
        ConfigError: a folder without tokenizer; and see `load`.
    """
    model, tokenizer = load(path, adapter_path)
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", advice="Convert again with tokenizer.model in place.")
    if system is not None:
        tokenizer.system_prompt = parse_system_prompt(system)
        return model, tokenizer
    folder = resolve(path)
    notice = system_prompt_notice(trained_system_prompts_of(folder, adapter_path), adapter_path or folder)
    if notice is not None:
        on_note(notice)
    return model, tokenizer


def system_prompts_of(folder: Path, adapter: Adapter | None) -> SystemPrompts:
    """The system prompts that an adapter was trained with; if it names none, those of what was fused into the folder.

    Raises:
        FormatError: the folder's `config.json` names them in another form.
    """
    if adapter is not None and adapter.system_prompts:
        return adapter.system_prompts
    try:
        return parse_system_prompts(kept_settings(folder).get(SYSTEM_PROMPTS))
    except ConfigError as error:
        raise FormatError(str(error), where=folder / "config.json") from error


def trained_system_prompts_of(folder: Path, adapter_path: str | Path | None) -> SystemPrompts:
    """The same for the file or folder of an adapter, without reading its tensors.

    Raises:
        FormatError, AdapterError: see `read_system_prompts` and `system_prompts_of`.
    """
    named = () if adapter_path is None else read_system_prompts(adapter_path)
    return named or system_prompts_of(folder, None)


def load_tokenizer(folder: str | Path) -> AFMTokenizer | None:
    """The tokenizer of a model folder, or None if it has none.

    Raises:
        ConfigError: it has more pieces than the model has tokens. FormatError: no tokenizer.
    """
    folder = to_path(folder)
    file = folder / TOKENIZER
    tokenizer = AFMTokenizer.from_file(file) if file.is_file() else None
    if tokenizer is not None and (folder / "config.json").is_file():
        rows = read_config(folder).vocab_size
        if tokenizer.vocab_size > rows:
            advice = "Use the tokenizer.model that came with the model."
            expected, found = f"at most the {rows} tokens of the model", f"{tokenizer.vocab_size} pieces"
            what = "the tokenizer is another model's"
            raise ConfigError(what, where=file, expected=expected, found=found, advice=advice)
    return tokenizer


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
