"""Which layers an adapter sits on, as text: `all`, `ordinary`, `reuse`, `3`, `0-34`, `last-16`, or some of these.

Layers are counted over the whole model, ordinary ones first: 0-34 are the ordinary layers of the
3.18 B parameter model and 35-55 those that reuse keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_afm.checkpoints.names import QKV, Kind, layer_of, plan_names, target_of
from mlx_afm.errors import SettingError
from mlx_afm.model import AFMConfig, ToolkitConfig

ALL = "all"
_PART = re.compile(r"all|ordinary|reuse|last-(?P<last>\d{1,4})|(?P<first>\d{1,4})(?:-(?P<end>\d{1,4}))?", re.ASCII)


def layer_faults(spec: object) -> list[str]:
    """What is wrong with the text, whatever the model."""
    expected = "expected all, ordinary, reuse, last-N, numbers or ranges such as 0-34, with commas between"
    if not isinstance(spec, str):
        return [f"layers: {expected}, found {spec!r}"]
    return [f"layers: {expected}, found {part or 'nothing'!r}" for part in _parts(spec) if not _PART.fullmatch(part)]


def _parts(spec: str) -> list[str]:
    return [part.strip() for part in spec.split(",")]


def chosen_layers(spec: str, base: AFMConfig) -> frozenset[int]:
    """The layers a text means for a model.

    Raises:
        ConfigError: layers that the model does not have, or none at all.
    """
    count, ordinary = base.num_layers, base.num_ordinary_layers
    chosen: set[int] = set()
    for part in _parts(spec):
        match = _PART.fullmatch(part)
        assert match, "LoRAConfig has checked it"
        if match["last"] is not None:
            found = range(count - int(match["last"]), count)
        elif match["first"] is not None:
            found = range(int(match["first"]), int(match["end"] or match["first"]) + 1)
        else:
            named = {"all": range(count), "ordinary": range(ordinary), "reuse": range(ordinary, count)}
            found = named[part]
        if not found or found[0] < 0 or found[-1] >= count:
            expected = f"some of 0-{count - 1} ({ordinary} ordinary, {count - ordinary} reuse)"
            raise SettingError("the model has no such layers", expected=expected, found=part)
        chosen |= set(found)
    return frozenset(chosen)


def coded_projections(layers: str, targets: Sequence[str], base: AFMConfig) -> dict[str, tuple[int, int]]:
    """Module path and shape (out, in) of the projections that qat means, whole matrices, in the toolkit's order.

    Raises:
        ConfigError: layers that the model does not have.
    """
    chosen, found = chosen_layers(layers, base), {}
    for entry in plan_names(ToolkitConfig(model=base, adapter=None)):
        path = entry.ours.removesuffix(".weight")
        if entry.kind is Kind.WEIGHT and len(entry.shape) == 2 and layer_of(entry.ours, base) in chosen:
            target = QKV.target[0] if path.endswith(QKV.ours) else target_of(entry.ours)
            if target in targets:
                found[path] = (entry.shape[0], entry.shape[1])
    return found
