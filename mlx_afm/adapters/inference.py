"""Adapters in memory for inference: put beside each other on one model, and chosen for each row of a batch.

    adapters = AdapterStacks(form)                  form: an InferenceModel
    adapters.add("poet", weights, scale=0.5)
    routes = adapters.routes(["poet", None])        row 0 with the adapter, row 1 without
    decoder.step(tokens, cache, routes, ...)

DoRA adapters multiply rows of the base and have no place in a stack: each is an inference model of its own, which
shares the base's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod

import mlx.core as mx

from mlx_afm.adapters.attach import adapter_weights
from mlx_afm.errors import AdapterError
from mlx_afm.model import Model
from mlx_afm.model.inference import InferenceModel, fused_matrices
from mlx_afm.model.lora import PARTS, LoRAFusedLinear, LoRALinear
from mlx_afm.model.low_rank import (
    AdaptedFusedLinear,
    AdaptedGateUp,
    LowRank,
    LowRankStack,
    MagnitudeLinear,
    Routes,
)

Weights = Mapping[str, Callable[[], mx.array]]
KEPT_WINDOWS = 64  # views of which are held
_Pair = dict[str, Callable[[], mx.array]]
_Layout = tuple[tuple[str, int], ...]  # name and width of each adapter in a window, in one module
_View = tuple[mx.array, mx.array, _Layout]


class AdapterStacks:
    """The low-rank adapters of one inference model.

    Args:
        form: whose modules take them.

    Attributes:
        sizes: bytes of each adapter by its name, in the order in which their matrices lie.

    Cost: each adapter's matrices once, in the model's dtype; of the fused projection B with zeros between its parts,
        2 R (Q + 2 K) values a layer for nothing. `add` and `remove` copy what is held, a module at a time.
    """

    def __init__(self, form: InferenceModel) -> None:
        self._form = form
        self._modules = form.adaptable()
        self._stacks: dict[str, LowRankStack] = {}
        self._views: dict[tuple[str, ...], dict[str, _View]] = {}  # of windows that were used
        self._last: tuple[tuple[str | None, ...], Routes] = (), ()  # what `routes` was last asked and gave
        self.sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def add(self, name: str, weights: Weights, scale: float) -> int:
        """Puts an adapter behind the others; returns its bytes.

        Args:
            weights: what gives `...lora_a` (D, R) and `...lora_b` (R, O), float32, by our names.
            scale: of B A.

        Raises:
            AdapterError: there is one of this name; values that are not finite in the model's dtype.
        """
        if name in self:
            raise AdapterError("there is an adapter of this name", where=name)
        size = 0
        self._forget_views()
        try:
            for path, (a, b) in self._matrices(_pairs(weights), scale):
                size += a.nbytes + b.nbytes
                self._stacks.setdefault(path, LowRankStack()).append(name, a, b)
        except BaseException:  # a file that cannot be read to its end leaves nothing behind
            self._drop(name)
            raise
        self.sizes[name] = size
        return size

    def remove(self, name: str) -> None:
        """Forgets an adapter; its memory is free again. One that is not here is no error."""
        if self.sizes.pop(name, None) is not None:
            self._drop(name)

    def size_of(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes that `add` would return for an adapter with these shapes, by our names."""
        ranks = {name.removesuffix(".lora_a"): shape[1] for name, shape in shapes.items() if name.endswith(".lora_a")}
        values = 0
        for path, module in self._modules.items():
            if isinstance(module, AdaptedFusedLinear):
                parts = [part for part in PARTS if f"{path}.{part}" in ranks]
                outputs = module.linear.q_dims + 2 * module.linear.kv_dims
                values += sum(
                    shapes[f"{path}.{part}.lora_a"][0] * ranks[f"{path}.{part}"] + ranks[f"{path}.{part}"] * outputs
                    for part in parts
                )
            elif isinstance(module, AdaptedGateUp):
                parent = path.rpartition(".")[0]
                found = [p for part in ("gate", "up") if (p := f"{parent}.{part}_proj") in ranks]
                values += 2 * sum(map(prod, _shapes_of(shapes, found[0]))) if found else 0
            elif path in ranks:
                values += sum(map(prod, _shapes_of(shapes, path)))
        return values * self._form.dtype.size

    def routes(self, names: Sequence[str | None]) -> Routes:
        """What rows with these adapters add to the base; None, or a name that is not here, is the base alone.

        Rows that all have one adapter take plain products. Else a window holds adapters that lie beside each other,
        those of the rows and at most as many bytes of others: few windows, and little that is computed for nothing.
        """
        if tuple(names) == self._last[0]:
            return self._last[1]
        used = {name for name in names if name is not None and name in self}
        alike, masks = len(used) == 1 and used.issuperset(names), dict[_Layout, mx.array]()
        routes = []
        for window in self._windows(used):
            found: dict[str, LowRank] = {}
            for path, (a, b, layout) in self._views_of(window).items():
                if not alike and layout not in masks:
                    masks[layout] = _mask(layout, names)
                found[path] = a, b, None if alike else masks[layout]
            routes.append(found)
        self._last = tuple(names), routes
        return routes

    def _windows(self, used: Collection[str]) -> list[tuple[str, ...]]:
        order, found = list(self.sizes), list[tuple[str, ...]]()
        for end, name in enumerate(order, start=1):
            if name not in used:
                continue
            wider = tuple(order[order.index(found[-1][0]) : end]) if found else (name,)
            needed = sum(self.sizes[each] for each in wider if each in used)
            if sum(self.sizes[each] for each in wider) <= 2 * needed:
                found[-1:] = [wider]
            else:
                found.append((name,))
        return found

    def _views_of(self, window: tuple[str, ...]) -> dict[str, _View]:
        """Of each module that adapters of a window are on, their matrices and the columns of each."""
        if window not in self._views:
            if len(self._views) >= KEPT_WINDOWS:
                self._views.clear()
            views = {}
            for path, stack in self._stacks.items():
                layout = tuple((name, stack.widths[name]) for name in window if name in stack.widths)
                if layout:
                    views[path] = *stack.window([name for name, _ in layout]), layout
            self._views[window] = views
        return self._views[window]

    def _forget_views(self) -> None:
        """Lets go of the arrays that views share, so that a module's old ones are free as soon as it has new ones."""
        self._views.clear()
        self._last = (), ()

    def _drop(self, name: str) -> None:
        self._forget_views()
        for path, stack in list(self._stacks.items()):
            if name in stack.widths:
                stack.remove(name)
            if not stack.widths:
                del self._stacks[path]

    def _matrices(self, pairs: Mapping[str, _Pair], scale: float) -> Iterator[tuple[str, tuple[mx.array, mx.array]]]:
        """For each module that the adapter is on: its path, A (R, D) and B (R, O) in the model's dtype."""
        for path, module in self._modules.items():
            if isinstance(module, AdaptedFusedLinear):
                linear = module.linear
                sizes = dict(zip(PARTS, (linear.q_dims, linear.kv_dims, linear.kv_dims)))
                found = {
                    part: self._read(name, pairs[name], scale) for part in PARTS if (name := f"{path}.{part}") in pairs
                }
                if found:
                    a, b = fused_matrices(found, sizes)
                    yield path, (a.T, b)
            elif isinstance(module, AdaptedGateUp):
                parent = path.rpartition(".")[0]
                both = [f"{parent}.{part}_proj" for part in ("gate", "up")]
                read = [self._read(name, pairs[name], scale) if name in pairs else None for name in both]
                if any(read):
                    like = next(pair for pair in read if pair is not None)
                    full = [pair or tuple(map(mx.zeros_like, like)) for pair in read]
                    yield path, (mx.stack([a.T for a, _ in full]), mx.stack([b for _, b in full]))
            elif path in pairs:
                a, b = self._read(path, pairs[path], scale)
                yield path, (a.T, b)

    def _read(self, path: str, pair: _Pair, scale: float) -> tuple[mx.array, mx.array]:
        """A (D, R) and B (R, O) of one projection in the model's dtype, the scale folded into B."""
        dtype = self._form.dtype
        a, b = pair["lora_a"]().astype(dtype), (scale * pair["lora_b"]()).astype(dtype)
        for kind, array in (("lora_a", a), ("lora_b", b)):
            # In a mixed batch such a value would spoil the answers of all rows.
            if not mx.isfinite(array).all().item():
                expected = f"finite values, also as {str(dtype).rpartition('.')[2]}"
                raise AdapterError("an adapter's values cannot be used", where=f"{path}.{kind}", expected=expected)
        return a, b


def _mask(layout: _Layout, names: Sequence[str | None]) -> mx.array:
    """The columns of a window that each row uses, bool (B, W)."""
    owners = [owner for owner, width in layout for _ in range(width)]
    return mx.array([[owner == name for owner in owners] for name in names])


def _pairs(weights: Weights) -> dict[str, _Pair]:
    """The matrices by module path: `{"...q_proj": {"lora_a": ..., "lora_b": ...}}`."""
    pairs: dict[str, _Pair] = {}
    for name, read in weights.items():
        path, _, kind = name.rpartition(".")
        pairs.setdefault(path, {})[kind] = read
    return pairs


def _shapes_of(shapes: Mapping[str, Sequence[int]], path: str) -> tuple[Sequence[int], Sequence[int]]:
    return shapes[f"{path}.lora_a"], shapes[f"{path}.lora_b"]


def dora_size(form: InferenceModel, shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of a DoRA adapter in its inference form, from the shapes of its tensors, by our names."""
    modules, values, fused = form.adaptable(), 0, set()
    for name in shapes:
        path, _, kind = name.rpartition(".")
        if kind != "lora_a":
            continue
        (inputs, rank), (_, outputs) = _shapes_of(shapes, path)
        parent, _, part = path.rpartition(".")
        if part in PARTS:
            linear = modules[parent].linear
            outputs = linear.q_dims + 2 * linear.kv_dims
        values += rank * (inputs + outputs) + (0 if parent in fused else outputs)
        if part in PARTS:
            fused.add(parent)
    return values * form.dtype.size


def magnitude_bytes(form: InferenceModel) -> int:
    """Bytes that the DoRA layers of an inference model hold beside the base's arrays, which are computed if need be."""
    layers = [module for module in form.model.modules() if isinstance(module, MagnitudeLinear)]
    own = [array for layer in layers for array in (layer.lora_a, layer.lora_b, layer.factor)]
    mx.eval(own)
    return sum(array.nbytes for array in own)


def own_weights(model: Model) -> tuple[Weights, float] | None:
    """The LoRA adapter on a model, as `AdapterStacks.add` takes it; None if there is none (DoRA, whole weights)."""
    layers = [module for module in model.modules() if isinstance(module, (LoRALinear, LoRAFusedLinear))]
    if not layers:
        return None
    return {name: (lambda array=array: array) for name, array in adapter_weights(model).items()}, layers[0].scale
