"""Load a model folder, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

from mlx_afm.folders import OnNote, ignore_note
from mlx_afm.model import Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.text.system_prompt import (
    SystemPrompts,
    default_system_prompt,
    parse_system_prompt,
    system_prompt_notice,
)
from mlx_afm.text.tokenizer import AFMTokenizer


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
    model, tokenizer, _ = _load(ModelFolder(path), adapter_path, lazy=lazy)
    return model, tokenizer


def _load(
    folder: ModelFolder, adapter_path: str | Path | None, *, lazy: bool = False
) -> tuple[Model, AFMTokenizer | None, SystemPrompts]:
    """See `load`; the last are the system prompts that the model was trained with."""
    adapter = None if adapter_path is None else folder.open_adapter(adapter_path)
    model = folder.load_with(adapter, where=adapter_path, lazy=lazy)
    trained_with = folder.system_prompts_of(adapter)
    if folder.tokenizer is not None:
        folder.tokenizer.system_prompt = default_system_prompt(trained_with)
    return model, folder.tokenizer, trained_with


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
    folder = ModelFolder(path)
    tokenizer = folder.require_tokenizer()
    model, _, trained_with = _load(folder, adapter_path)
    if system is not None:
        tokenizer.system_prompt = parse_system_prompt(system)
        return model, tokenizer
    notice = system_prompt_notice(trained_with, adapter_path or folder.path)
    if notice is not None:
        on_note(notice)
    return model, tokenizer
