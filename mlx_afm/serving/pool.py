"""Adapters by name: which there are, which are in memory, and which of those has to leave for another."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_afm.adapters import Adapter
from mlx_afm.errors import AdapterError, AFMError
from mlx_afm.serving.adapters import LOW_RANK, AdapterSwitch
from mlx_afm.text.system_prompt import SystemPrompts
from mlx_afm.workflows.load import open_adapter, system_prompts_of, trained_system_prompts_of


@dataclass
class Entry:
    """One adapter.

    Attributes:
        path: where it is on disk.
        size_bytes: in memory, as its file says.
        users: answers under way that need it.
        used_at: when it was last asked for, in uses of the pool.
        loads: how often it was read.
        system_prompts: that it was trained with.
    """

    path: Path
    size_bytes: int
    users: int = 0
    used_at: int = 0
    loads: int = 0
    system_prompts: SystemPrompts = ()


class AdapterPool:
    """Adapters within a limit of memory; the least recently used leaves, never one in use.

    Args:
        switch: holds those that are in memory.
        folder: of the model that they must fit.
        limit_bytes: of all of them together.
        reserved: the name of the base, which no adapter may have.

    All methods belong to the thread that owns the model, except `names` and `system_prompts`.
    """

    def __init__(self, switch: AdapterSwitch, folder: Path, limit_bytes: int, *, reserved: str = "") -> None:
        self._switch, self._folder, self.limit_bytes, self._reserved = switch, folder, limit_bytes, reserved
        self._entries: dict[str, Entry] = {}
        self._base_prompts = system_prompts_of(folder, None)
        self._leaving: set[str] = set()
        self._uses = 0
        self.names: tuple[str, ...] = ()

    def register(self, name: str, path: Path) -> Entry:
        """Makes an adapter known. Its file is checked now, its values are read when it is first asked for.

        Raises:
            AdapterError: the name is taken, or it cannot be served within the limit.
            FormatError, TensorsError: not an adapter of this model.
        """
        if name == self._reserved:
            raise AdapterError(
                "this is what the base is called", where=name, advice="Choose another, or set --model-id."
            )
        if name in self._entries:
            raise AdapterError("there is an adapter of this name", where=name, advice="Remove it first.")
        adapter = self._open(path)
        size = size_bytes(adapter)
        if size > self.limit_bytes:
            expected, advice = f"at most {self.limit_bytes} bytes", "Raise --adapter-memory."
            raise AdapterError(
                "the adapter is larger than the memory for all",
                where=path,
                expected=expected,
                found=size,
                advice=advice,
            )
        self._entries[name] = Entry(path, size, system_prompts=system_prompts_of(self._folder, adapter))
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

    def acquire(self, name: str) -> bool:
        """Sees to it that an adapter is in memory and stays there until `release`; False if there is no room yet.

        Raises:
            AFMError: it was removed, or its file cannot be read any more.
        """
        if name not in self.names:
            raise AdapterError("the adapter was removed", where=name)
        entry = self._entries[name]
        if name not in self._switch:
            if not self._make_room(entry.size_bytes):
                return False
            adapter = self._open(entry.path)
            self._switch.add(name, adapter, where=entry.path)
            entry.system_prompts = system_prompts_of(self._folder, adapter)  # the file may be another than last time
            entry.loads += 1
        self._uses += 1
        entry.users, entry.used_at = entry.users + 1, self._uses
        return True

    def release(self, name: str) -> None:
        """One answer fewer needs it."""
        self._entries[name].users -= 1
        self._drop_if_leaving(name)

    def system_prompts(self, name: str) -> SystemPrompts:
        """Those that a model id was trained with, the base's if there is no such adapter. Any thread may ask."""
        entry = self._entries.get(name)
        if entry is None:
            return self._base_prompts
        if name not in self._switch:  # its file may be another than last time
            with suppress(AFMError, OSError):  # `acquire` says what is wrong with it
                return trained_system_prompts_of(self._folder, entry.path)
        return entry.system_prompts

    @property
    def held_bytes(self) -> int:
        """Of the adapters in memory."""
        return sum(self._switch.sizes[name] for name in self._entries if name in self._switch)

    def state(self) -> list[dict[str, object]]:
        """Of each adapter: name, path, bytes, whether it is in memory, answers that use it, how often it was read."""
        return [
            {
                "name": name,
                "path": str(entry.path),
                "bytes": entry.size_bytes,
                "loaded": name in self._switch,
                "users": entry.users,
                "loads": entry.loads,
            }
            for name, entry in self._entries.items()
            if name in self.names
        ]

    def _open(self, path: Path) -> Adapter:
        adapter = open_adapter(self._folder, path)
        if (kind := adapter.config.fine_tune_type) not in LOW_RANK:
            expected, advice = " or ".join(LOW_RANK), "Fuse it, and serve the fused model."
            what = "only low-rank adapters can share a base"
            raise AdapterError(what, where=path, expected=expected, found=kind, advice=advice)
        return adapter

    def _make_room(self, wanted_bytes: int) -> bool:
        idle = sorted((e.used_at, n) for n, e in self._entries.items() if n in self._switch and not e.users)
        while self.held_bytes + wanted_bytes > self.limit_bytes:
            if not idle:
                return False
            self._switch.remove(idle.pop(0)[1])
        mx.clear_cache()
        return True

    def _drop_if_leaving(self, name: str) -> None:
        if name in self._leaving and not self._entries[name].users:
            self._leaving.discard(name)
            self._switch.remove(name)
            del self._entries[name]


def size_bytes(adapter: Adapter) -> int:
    """What an adapter takes in memory, from the shapes of its tensors; DoRA keeps the lengths of rows besides."""
    sizes = {name: 4 * math.prod(tensor.shape) for name, tensor in adapter.weights.items()}
    return sum(sizes.values()) + sum(size for name, size in sizes.items() if name.endswith(".m"))
