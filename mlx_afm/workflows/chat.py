"""What a chat needs from disk: the model, adapters to change between, and a file to save the conversation to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_afm.adapters import Adapter, attach_adapter, remove_adapter
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.errors import AFMError, ConfigError, SettingError
from mlx_afm.files import to_json, to_optional_path, to_path, write_text
from mlx_afm.model import Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.text.system_prompt import default_system_prompt, system_prompt_notice

FORMS = (".jsonl", ".json")


class ChatModel:
    """A model, and the adapter that is on it, which can be changed for another.

    Args:
        path: MLX model folder, or the hub id of one.
        adapters: paths of adapters by name, for `use`.
        adapter_path: the first one to use.

    Attributes:
        model: changed in place, or another one after `use`.
        tokenizer: None if the folder has none; `use` sets its `system_prompt` as `load` does.
        notice: a warning about the system prompts of the adapter in use, or None.
        active: name or path of the adapter in use; None for what the folder itself has.
    """

    def __init__(
        self,
        path: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        adapter_path: str | Path | None = None,
    ) -> None:
        adapter_path = to_optional_path(adapter_path)
        self._folder = ModelFolder(path)
        self.adapters = {name: to_path(place) for name, place in (adapters or {}).items()}
        adapter = None if adapter_path is None else self._folder.open_adapter(adapter_path)
        self.model = self._folder.load_with(adapter, where=adapter_path)
        self.tokenizer = self._folder.tokenizer
        self.active = None if adapter_path is None else str(adapter_path)
        self._current = adapter_path
        self._whole = _is_whole(adapter)
        self.notice: str | None = None
        self._take_prompts(adapter, adapter_path)

    def use(self, name: str | None) -> Model:
        """The model with another adapter; keys and values of the one before are of no use with it.

        Args:
            name: one of `adapters`, or a path; None for what the folder itself has.

        Raises:
            ConfigError: no such name or path. FormatError, TensorsError, AdapterError: not an adapter of this model.
                What was in use then stays.
        """
        path = None if name is None else self._find(name)
        adapter = self._adapter(path)
        try:
            self._put_on(path, adapter)
        except AFMError:
            before = self._current
            self._put_on(before, self._adapter(before))
            raise
        self._current, self.active = path, name
        self._take_prompts(None if path is None else adapter, name)
        return self.model

    def _take_prompts(self, adapter: Adapter | None, where: object) -> None:
        trained_with = self._folder.system_prompts_of(adapter)
        self.notice = system_prompt_notice(trained_with, where or self._folder.path)
        if self.tokenizer is not None:
            self.tokenizer.system_prompt = default_system_prompt(trained_with)

    def _find(self, name: str) -> Path:
        path = self.adapters.get(name, to_path(name))
        if name not in self.adapters and not path.exists():
            known = ", ".join(self.adapters) or "none was named"
            raise ConfigError("no such adapter", where=name, expected=f"a path, or a name ({known})")
        return path

    def _adapter(self, path: Path | None) -> Adapter | None:
        return self._folder.active_base_adapter if path is None else self._folder.open_adapter(path)

    def _put_on(self, path: Path | None, adapter: Adapter | None) -> None:
        whole = _is_whole(adapter)
        if whole or self._whole:  # weights of its own take the place of the base's
            self.model = self._folder.load_with(adapter, where=path)
        else:
            remove_adapter(self.model)
            if adapter is not None:
                attach_adapter(self.model, adapter, where=path)
        self._whole = whole


def _is_whole(adapter: Adapter | None) -> bool:
    return adapter is not None and adapter.config.fine_tune_type in WHOLE_WEIGHTS


def save_chat(path: str | Path, conversation: Sequence[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Writes a conversation as training data: one record, which `--data` and `generate --prompt` read again.

    Args:
        path: `.jsonl`, the conversation on its line; or `.json`, an array of this one record.
        conversation: from `Chat.conversation`.
        overwrite: replace a file.

    Raises:
        ConfigError: nothing to save, another ending, or a file in the way.
    """
    path = to_path(path)
    if not any(message["role"] == "assistant" for message in conversation):
        raise ConfigError("nothing was answered yet", where=path)
    if path.suffix not in FORMS:
        raise SettingError("the name of a saved chat", where=path, expected=f"{' or '.join(FORMS)} at its end")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError("there is a file or folder of this name", where=path, advice="Choose another name.")
    record = list(conversation)
    if path.suffix == ".json":
        write_text(path, to_json([{"messages": record}], indent=2) + "\n")
    else:
        write_text(path, to_json(record) + "\n")
