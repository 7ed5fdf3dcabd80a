"""Adapters by name: which there are, which are in memory, and which of those has to leave for another.

LoRA adapters lie beside each other on the base's inference form, and their rows share each forward pass. A DoRA adapter
is an inference form of its own that shares the base's arrays. Both are read from disk straight into these forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_afm.adapters import Adapter, attach_adapter, is_zero, remove_adapter
from mlx_afm.adapters.inference import AdapterStacks, dora_size, magnitude_bytes
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.errors import AdapterError, AFMError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.generation.decode import Decoder
from mlx_afm.model import Model
from mlx_afm.model.inference import InferenceModel
from mlx_afm.model.low_rank import Routes
from mlx_afm.model_folder import ModelFolder
from mlx_afm.text.system_prompt import SystemPrompts

BASE = "(base)"  # in the stacks: the adapter that the base model itself carries
LOW_RANK = ("lora", "dora")


@dataclass
class PooledAdapter:
    """One adapter.

    Attributes:
        path: where it is on disk.
        size_bytes: in memory, as its file says.
        users: answers under way that need it.
        used_at: when it was last asked for, in uses of the pool.
        loads: how often it was read.
        system_prompts: that it was trained with.
        has_no_effect: answers are the base's, since all B are zero.
    """

    path: Path
    size_bytes: int
    users: int = 0
    used_at: int = 0
    loads: int = 0
    system_prompts: SystemPrompts = ()
    has_no_effect: bool = False


class AdapterPool:
    """A base model and its adapters within a limit of memory; the least recently used leaves, never one in use.

    Args:
        model: without an adapter.
        folder: of the model that adapters must fit.
        limit_bytes: of all of them together.
        own: the adapter that the base itself carries, if there is one; it does not count.
        reserved: the name of the base, which no adapter may have.

    Attributes:
        decoder: of the base and all LoRA adapters. Those of DoRA adapters share its counters.
        on_change: told the name of an adapter that came into memory or left; the matrices of others may have moved.

    All methods belong to the thread that owns the model, except `names` and `system_prompts`.
    """

    def __init__(
        self, model: Model, folder: ModelFolder, limit_bytes: int, *, own: Adapter | None = None, reserved: str = ""
    ) -> None:
        self._model, self._folder, self.limit_bytes, self._reserved = model, folder, limit_bytes, reserved
        self._form = InferenceModel(model)
        self._stacks = AdapterStacks(self._form)
        self.decoder = Decoder(self._form)
        self._dora: dict[str, tuple[Decoder, int]] = {}  # with their bytes
        self._entries: dict[str, PooledAdapter] = {}
        self._base_prompts = folder.system_prompts_of(None)
        self._leaving: set[str] = set()
        self._uses = 0
        self.names: tuple[str, ...] = ()
        self.on_change: Callable[[str], None] = lambda name: None
        if own is not None:
            self._stacks.add(BASE, _readers(own), own.config.scale)

    # Which there are.

    def register(self, name: str, path: Path) -> PooledAdapter:
        """Makes an adapter known. Its file is read and checked now, and read again when it is first asked for.

        Raises:
            AdapterError: the name is taken, or it cannot be served within the limit.
            FormatError, TensorsError: not an adapter of this model, or one with values that are not finite.
        """
        if name in (self._reserved, BASE):
            advice = "Choose another, or set --model-id."
            raise AdapterError("this is what the base is called", where=name, advice=advice)
        if name in self._entries:
            raise AdapterError("there is an adapter of this name", where=name, advice="Remove it first.")
        adapter, size = self._open(path)
        prompts, no_effect = self._folder.system_prompts_of(adapter), is_zero(adapter)
        self._entries[name] = PooledAdapter(path, size, system_prompts=prompts, has_no_effect=no_effect)
        self.names = tuple(self._entries)
        return self._entries[name]

    def unregister(self, name: str) -> bool:
        """Forgets an adapter; answers under way keep it until they end. Returns whether it was known."""
        if name not in self.names:
            return False
        self.names = tuple(known for known in self.names if known != name)
        self._leaving.add(name)
        self._drop_if_leaving(name)
        return True

    def system_prompts(self, name: str) -> SystemPrompts:
        """Those that a model id was trained with, the base's if there is no such adapter. Any thread may ask."""
        entry = self._entries.get(name)
        if entry is None:
            return self._base_prompts
        if not self._is_loaded(name):  # its file may be another than last time
            with suppress(AFMError, OSError):  # `acquire` says what is wrong with it
                return self._folder.system_prompts_at(entry.path)
        return entry.system_prompts

    def state(self) -> list[dict[str, object]]:
        """Of each adapter: name, path, bytes, whether it is in memory, answers that use it, how often it was read."""
        return [
            {
                "name": name,
                "path": str(entry.path),
                "bytes": entry.size_bytes,
                "loaded": self._is_loaded(name),
                "users": entry.users,
                "loads": entry.loads,
            }
            for name, entry in self._entries.items()
            if name in self.names
        ]

    # Which are in memory.

    def acquire(self, name: str | None) -> Decoder | None:
        """The decoder for rows with an adapter, which is in memory and stays there until `release`.

        Args:
            name: of the adapter; None for the base.

        Returns: None if there is no room yet.

        Raises:
            AFMError: it was removed, or its file cannot be read any more.
        """
        if name is None:
            return self.decoder
        if name not in self.names:
            raise AdapterError("the adapter was removed", where=name)
        entry = self._entries[name]
        if not self._is_loaded(name):
            adapter, entry.size_bytes = self._open(entry.path)  # the file may be another than last time
            if not self._make_room(entry.size_bytes):
                return None
            self._load(name, adapter, entry.path)
            entry.system_prompts = self._folder.system_prompts_of(adapter)
            entry.loads += 1
        self._uses += 1
        entry.users, entry.used_at = entry.users + 1, self._uses
        return self._dora[name][0] if name in self._dora else self.decoder

    def release(self, name: str | None) -> None:
        """One request fewer needs it."""
        if name is not None:
            self._entries[name].users -= 1
            self._drop_if_leaving(name)

    def routed_name(self, name: str | None) -> str | None:
        """What `routes_of` calls an adapter; None for the base."""
        return BASE if name is None and BASE in self._stacks else name

    def routes_of(self, decoder: Decoder) -> Callable[[Sequence[str | None]], Routes]:
        """What rows of a decoder add for their adapters; those of a DoRA adapter add nothing."""
        return self._stacks.routes if decoder is self.decoder else lambda names: ()

    @property
    def held_bytes(self) -> int:
        """Of the adapters in memory, in their inference form."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        stacked = {name: size for name, size in self._stacks.sizes.items() if name != BASE}
        return stacked | {name: size for name, (_, size) in self._dora.items()}

    def _is_loaded(self, name: str) -> bool:
        return name in self._stacks or name in self._dora

    def _open(self, path: Path) -> tuple[Adapter, int]:
        """An adapter, its values still on disk, and its bytes in memory."""
        adapter = self._folder.open_adapter(path)
        if (kind := adapter.config.fine_tune_type) not in LOW_RANK:
            expected, advice = " or ".join(LOW_RANK), "Fuse it, and serve the fused model."
            what = "only low-rank adapters can share a base"
            raise AdapterError(what, where=path, expected=expected, found=kind, advice=advice)
        shapes = {name: tensor.shape for name, tensor in adapter.weights.items()}
        size = dora_size(self._form, shapes) if kind == "dora" else self._stacks.size_of(shapes)
        if size > self.limit_bytes:
            what, expected = "the adapter is larger than the memory for all", f"at most {self.limit_bytes} bytes"
            raise AdapterError(what, where=path, expected=expected, found=size, advice="Raise --adapter-memory.")
        return adapter, size

    def _load(self, name: str, adapter: Adapter, path: Path) -> None:
        if adapter.config.fine_tune_type != "dora":
            self._stacks.add(name, _readers(adapter), adapter.config.scale)
        else:
            try:
                attach_adapter(self._model, adapter, where=path)
                form = InferenceModel(self._model, beside=self._form)
                size = magnitude_bytes(form)
            finally:
                remove_adapter(self._model)
            self._dora[name] = Decoder(form, counters=self.decoder.counters), size
        mx.clear_cache()
        self.on_change(name)

    def _unload(self, name: str) -> None:
        if self._is_loaded(name):
            self._stacks.remove(name)
            self._dora.pop(name, None)
            self.on_change(name)

    def _make_room(self, wanted_bytes: int) -> bool:
        """Unloads what was used longest ago until there is room; False if what is in use takes too much."""
        sizes = self._sizes()
        idle = sorted((e.used_at, n) for n, e in self._entries.items() if n in sizes and not e.users)
        leaving, held = [], sum(sizes.values())
        while held + wanted_bytes > self.limit_bytes:
            if not idle:
                return False
            leaving.append(idle.pop(0)[1])
            held -= sizes[leaving[-1]]
        for name in leaving:
            self._unload(name)
        mx.clear_cache()
        return True

    def _drop_if_leaving(self, name: str) -> None:
        if name in self._leaving and not self._entries[name].users:
            self._leaving.discard(name)
            self._unload(name)
            del self._entries[name]


def _readers(adapter: Adapter) -> dict[str, Callable[[], mx.array]]:
    """What reads each tensor of an adapter from disk, in float32."""

    def read(tensor: LazyTensor) -> mx.array:
        return to_mlx(tensor).astype(mx.float32)

    return {name: partial(read, tensor) for name, tensor in adapter.weights.items()}
