"""Optimizers of `mlx.optimizers` over groups of tensors, each with a rate and a weight decay of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_afm.training.config import TrainConfig

MATRICES_ONLY = ("muon",)


@dataclass(frozen=True)
class _Kind:
    """What the tensors of a group have in common: optimizer, factor of the rate, decay or not."""

    optimizer: str
    factor: float
    decayed: bool


@dataclass
class _Group:
    factor: float
    optimizer: Any
    names: list[str] = field(default_factory=list)


class GroupedOptimizer:
    """Updates each trained tensor by the optimizer of its group.

    Ours rather than `mlx.optimizers.MultiOptimizer`, whose groups share one learning rate. Each
    group sees a flat dictionary of names, so its state is flat too and saved as it is.

    Args:
        config: which optimizer, its settings, and what sets tensors apart.
        parameters: the trained tensors by name; state of their size is allocated at once.
    """

    def __init__(self, config: TrainConfig, parameters: Mapping[str, mx.array]) -> None:
        groups: dict[_Kind, _Group] = {}
        for name, array in parameters.items():
            kind = _kind_of(config, name, array)
            if kind not in groups:
                groups[kind] = _Group(kind.factor, _make(config, kind))
            groups[kind].names.append(name)
        self._groups = list(groups.values())
        for group in self._groups:
            group.optimizer.init({name: parameters[name] for name in group.names})

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next update, before the factors of the groups."""
        for group in self._groups:
            group.optimizer.learning_rate = rate * group.factor

    def update(self, model: nn.Module, gradients: Any) -> None:
        """One update of the model's trained tensors, in place."""
        found, arrays, new = dict(tree_flatten(gradients)), dict(tree_flatten(model.trainable_parameters())), []
        for group in self._groups:
            mine = {name: found[name] for name in group.names}
            updated = group.optimizer.apply_gradients(mine, {name: arrays[name] for name in group.names})
            new += list(updated.items())
        model.update(tree_unflatten(new))

    @property
    def state(self) -> list[Any]:
        """The state of every group, a tree of arrays."""
        return [group.optimizer.state for group in self._groups]

    def arrays(self) -> dict[str, mx.array]:
        """The state by name, to be saved: `0.step`, `0.NAME OF A TENSOR.m`, ..."""
        return {
            ".".join((str(number), key)): array
            for number, group in enumerate(self._groups)
            for key, array in _flat(group.optimizer.state)
        }

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Takes back what `arrays` gave; names and shapes were checked."""
        for number, group in enumerate(self._groups):
            restored: dict[str, Any] = {}
            for key, value in group.optimizer.state.items():
                place = f"{number}.{key}"
                nested = isinstance(value, dict)
                restored[key] = {slot: arrays[f"{place}.{slot}"] for slot in value} if nested else arrays[place]
            group.optimizer.state = restored

    @property
    def state_bytes(self) -> int:
        """Size of the state."""
        return sum(array.nbytes for array in self.arrays().values())


def _flat(state: Mapping[str, Any]) -> list[tuple[str, mx.array]]:
    """Entries of a group's state; tensor names are keys here and are not taken apart."""
    flat: list[tuple[str, mx.array]] = []
    for key, value in state.items():
        entries = value if isinstance(value, dict) else None
        flat += [(key, value)] if entries is None else [(f"{key}.{slot}", array) for slot, array in entries.items()]
    return flat


def _kind_of(config: TrainConfig, name: str, array: mx.array) -> _Kind:
    not_a_matrix = array.ndim != 2 or "embedding" in name
    optimizer = "adamw" if config.optimizer in MATRICES_ONLY and not_a_matrix else config.optimizer
    factor = next((factor for end, factor in config.rate_factors.items() if name.endswith(end)), 1.0)
    return _Kind(optimizer, factor, not name.endswith(config.no_decay))


def _make(config: TrainConfig, kind: _Kind) -> Any:
    settings = dict(config.optimizer_config) if kind.optimizer == config.optimizer else {}
    rate, decay = config.learning_rate * kind.factor, config.decay if kind.decayed else 0.0
    if kind.optimizer == "adamw":
        return optimizers.AdamW(learning_rate=rate, weight_decay=decay, **{"bias_correction": True, **settings})
    if kind.optimizer == "adam":
        return optimizers.Adam(learning_rate=rate, **{"bias_correction": True, **settings})
    if kind.optimizer == "sgd":
        return optimizers.SGD(learning_rate=rate, weight_decay=decay, **settings)
    if kind.optimizer == "muon":
        return optimizers.Muon(learning_rate=rate, weight_decay=decay, **settings)
    # Its own step sizes are off, so that learning_rate and schedule mean what they say; scaling by the size
    # of a tensor too, since lora_b starts at zero.
    own = {"relative_step": False, "scale_parameter": False, **settings}
    return optimizers.Adafactor(learning_rate=rate, weight_decay=decay, **own)
