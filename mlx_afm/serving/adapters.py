"""Several adapters over one frozen base: each keeps its own adapted layers, and changing over moves references.

    switch = AdapterSwitch(model)
    switch.add("poet", read_adapter(path, model.args), where=path)
    switch.use("poet")          # the model now answers with that adapter
    switch.use(None)            # and now without

An adapted layer holds the plain one it adds to, so base weights are there once, however many adapters there are and
whatever ranks and projections they have.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.adapters import Adapter, has_adapter, remove_adapter
from mlx_afm.adapters.attach import LORA_LAYERS
from mlx_afm.errors import AdapterError
from mlx_afm.model import Model
from mlx_afm.workflows.load import attach

LOW_RANK = ("lora", "dora")


@dataclass(frozen=True)
class _Place:
    """Where a layer sits, and both forms of it."""

    parent: nn.Module
    key: str
    plain: nn.Module
    adapted: nn.Module


class AdapterSwitch:
    """Adapters that one model can change between.

    Args:
        model: without an adapter; all adapters share its weights.

    Cost: `use` sets one reference per adapted layer. Memory is the base and each added adapter's own arrays.
    """

    def __init__(self, model: Model) -> None:
        if has_adapter(model):
            raise AdapterError("the model has an adapter already", advice="Load it without one.")
        model.eval()
        self.model = model
        self.active: str | None = None
        self._places: dict[str, tuple[_Place, ...]] = {}
        self._bytes: dict[str, int] = {}

    def add(self, name: str, adapter: Adapter, *, where: object) -> int:
        """Reads an adapter's values and keeps it beside the others, without putting it to use; returns its bytes.

        Raises:
            AdapterError: there is one of this name, or it is of a kind that changes the base itself.
            TensorsError: not an adapter of this model.
        """
        if name in self._places:
            raise AdapterError("there is an adapter of this name", where=name)
        if (kind := adapter.config.fine_tune_type) not in LOW_RANK:
            expected, advice = " or ".join(LOW_RANK), "Fuse it, and serve the fused model."
            what = "only low-rank adapters can share a base"
            raise AdapterError(what, where=where, expected=expected, found=kind, advice=advice)
        before = self.active
        self.use(None)
        plain = dict(self.model.named_modules())
        try:
            attach(self.model, adapter, where=where)
            places = tuple(_place(plain, path, m) for path, m in self.model.named_modules() if _is_adapted(m))
        finally:
            remove_adapter(self.model)
            self.use(before)
        own = [array for place in places for array in _own_arrays(place.adapted)]
        mx.eval(own)
        self._places[name] = places
        self._bytes[name] = sum(array.nbytes for array in own)
        return self._bytes[name]

    def use(self, name: str | None) -> None:
        """Answers come with this adapter from now on; None for the base alone.

        Raises:
            AdapterError: none of this name was added.
        """
        if name == self.active:
            return
        if name is not None and name not in self._places:
            raise AdapterError("no such adapter", expected=", ".join(self._places) or "one that was added", found=name)
        for place in self._places.get(self.active, ()) if self.active is not None else ():
            setattr(place.parent, place.key, place.plain)
        for place in self._places[name] if name is not None else ():
            setattr(place.parent, place.key, place.adapted)
        self.active = name

    def remove(self, name: str) -> None:
        """Forgets an adapter; its memory is free again."""
        if self.active == name:
            self.use(None)
        self._places.pop(name, None)
        self._bytes.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each adapter's own arrays."""
        return dict(self._bytes)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LORA_LAYERS)


def _place(plain: dict[str, nn.Module], path: str, adapted: nn.Module) -> _Place:
    parent, _, key = path.rpartition(".")
    adapted.eval()  # dropout is for training
    return _Place(plain[parent], key, plain[path], adapted)


def _own_arrays(adapted: nn.Module) -> list[mx.array]:
    """Arrays of an adapted layer that are not the base's, also those that are not parameters."""
    return [
        value
        for name, module in adapted.named_modules()
        if name != "linear" and not name.startswith("linear.")
        for value in module.values()
        if isinstance(value, mx.array)
    ]
