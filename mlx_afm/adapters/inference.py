"""Adapters in memory for inference: put beside each other on one model, and chosen for each row of a batch.

    adapters = AdapterStacks(form)                  form: an InferenceModel
    adapters.add("poet", weights, scale=0.5)
    routes = adapters.routes(["poet", None])        row 0 with the adapter, row 1 without
    decoder.step(tokens, cache, routes, ...)

DoRA adapters multiply rows of the base and have no place in a stack: each is an inference model of its own, which
shares the base's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
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
    Bucket,
    LowRankStack,
    MagnitudeLinear,
    Slots,
)

Weights = Mapping[str, Callable[[], mx.array]]


class AdapterStacks:
    """The low-rank adapters of one inference model.

    Args:
        form: whose modules hold the stacks.

    Cost: each adapter's matrices once, in the model's dtype; of the fused projection B with zeros between its parts,
        2 R (Q + 2 K) values a layer for nothing. `add` and `remove` copy the stacks of one bucket, a module at a time.
    """

    def __init__(self, form: InferenceModel) -> None:
        self._form = form
        self._modules = form.adaptable()
        self._slots: dict[Bucket, list[str]] = {}
        self._stacks: dict[Bucket, dict[str, LowRankStack]] = {}
        self.sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def add(self, name: str, weights: Weights, scale: float) -> int:
        """Puts an adapter beside the others; returns its bytes.

        Args:
            weights: what gives `...lora_a` (D, R) and `...lora_b` (R, O), float32, by our names.
            scale: of B A.

        Raises:
            AdapterError: there is one of this name.
        """
        if name in self:
            raise AdapterError("there is an adapter of this name", where=name)
        pairs = _pairs(weights)
        bucket, size, done = _bucket(pairs), 0, list[str]()
        try:
            for path, (a, b) in self._matrices(pairs, scale):
                size += a.nbytes + b.nbytes
                self._append(path, bucket, a, b)
                done.append(path)
        except BaseException:  # a file that cannot be read to its end leaves nothing behind
            for path in done:
                self._drop(path, bucket, len(self._slots.get(bucket, ())))
            raise
        self._slots.setdefault(bucket, []).append(name)
        self.sizes[name] = size
        return size

    def remove(self, name: str) -> None:
        """Forgets an adapter; its memory is free again. One that is not here is no error."""
        if self.sizes.pop(name, None) is None:
            return
        bucket = self._bucket_of(name)
        slot = self._slots[bucket].index(name)
        del self._slots[bucket][slot]
        for path in list(self._stacks[bucket]):
            self._drop(path, bucket, slot)
        if not self._slots[bucket]:
            del self._slots[bucket], self._stacks[bucket]

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

    def routes(self, names: Sequence[str | None]) -> dict[Bucket, Slots]:
        """The slots of rows with these adapters; None is the base alone."""
        routes = {}
        for bucket, held in self._slots.items():
            slots = [held.index(name) if name in held else -1 for name in names]
            if max(slots, default=-1) < 0:
                continue
            mask = None if min(slots) >= 0 else mx.array([slot >= 0 for slot in slots])
            routes[bucket] = Slots(self._stacks[bucket], mx.array([max(slot, 0) for slot in slots], mx.int32), mask)
        return routes

    def route(self, name: str | None) -> dict[Bucket, Slots]:
        """The slots of rows that all have one adapter: plain products, without an index."""
        if name is None:
            return {}
        bucket = self._bucket_of(name)
        return {bucket: Slots(self._stacks[bucket], self._slots[bucket].index(name))}

    def _append(self, path: str, bucket: Bucket, a: mx.array, b: mx.array) -> None:
        """Puts an adapter's matrices behind those in one module."""
        stacks = self._stacks.setdefault(bucket, {})
        if path in stacks:
            held = stacks[path]
            a, b = mx.concatenate([held.lora_a, a]), mx.concatenate([held.lora_b, b])
        mx.eval(a, b)
        stacks[path] = LowRankStack(a, b)

    def _drop(self, path: str, bucket: Bucket, slot: int) -> None:
        """Takes one slot out of the stacks of one module."""
        stacks = self._stacks[bucket]
        held, width = stacks[path], len(stacks[path].lora_b) // len(stacks[path].lora_a)
        if len(held.lora_a) == 1:
            del stacks[path]
            return
        a = mx.concatenate([held.lora_a[:slot], held.lora_a[slot + 1 :]])
        b = mx.concatenate([held.lora_b[: width * slot], held.lora_b[width * (slot + 1) :]])
        mx.eval(a, b)
        stacks[path] = LowRankStack(a, b)

    def _bucket_of(self, name: str) -> Bucket:
        return next(bucket for bucket, names in self._slots.items() if name in names)

    def _matrices(
        self, pairs: Mapping[str, Mapping[str, Callable[[], mx.array]]], scale: float
    ) -> Iterator[tuple[str, tuple[mx.array, mx.array]]]:
        """For each module that the adapter is on: its path, A (1, D, R) and B (1, R, O) in the model's dtype."""
        for path, module in self._modules.items():
            if isinstance(module, AdaptedFusedLinear):
                linear = module.linear
                found = {part: pairs[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in pairs}
                sizes = dict(zip(PARTS, (linear.q_dims, linear.kv_dims, linear.kv_dims)))
                if found:
                    read = {part: (pair["lora_a"](), scale * pair["lora_b"]()) for part, pair in found.items()}
                    yield path, self._cast(*fused_matrices(read, sizes))
            elif isinstance(module, AdaptedGateUp):
                parent = path.rpartition(".")[0]
                both = [pairs.get(f"{parent}.{part}_proj") for part in ("gate", "up")]
                if any(both):
                    yield path, self._joined(both, scale)
            elif path in pairs:
                yield path, self._cast(pairs[path]["lora_a"](), scale * pairs[path]["lora_b"]())

    def _cast(self, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        return a.astype(self._form.dtype)[None], b.astype(self._form.dtype)[None]

    def _joined(
        self, both: Sequence[Mapping[str, Callable[[], mx.array]] | None], scale: float
    ) -> tuple[mx.array, mx.array]:
        """A of gate and up joined, (1, D, 2 R), and their B, (2, R, O); zeros for the one that has no adapter."""
        read = [None if pair is None else (pair["lora_a"](), scale * pair["lora_b"]()) for pair in both]
        like = next(pair for pair in read if pair is not None)
        full = [pair or (mx.zeros_like(like[0]), mx.zeros_like(like[1])) for pair in read]
        a, b = mx.concatenate([a for a, _ in full], axis=1), mx.stack([b for _, b in full])
        return a.astype(self._form.dtype)[None], b.astype(self._form.dtype)


def _pairs(weights: Weights) -> dict[str, dict[str, Callable[[], mx.array]]]:
    """The matrices by module path: `{"...q_proj": {"lora_a": ..., "lora_b": ...}}`."""
    pairs: dict[str, dict[str, Callable[[], mx.array]]] = {}
    for name, read in weights.items():
        path, _, kind = name.rpartition(".")
        pairs.setdefault(path, {})[kind] = read
    return pairs


def _bucket(pairs: Mapping[str, Mapping[str, Callable[[], mx.array]]]) -> Bucket:
    """The name of the bucket of adapters with these modules and this rank."""
    rank = next(iter(pairs.values()))["lora_a"]().shape[1]
    return f"rank {rank} {sha256(' '.join(sorted(pairs)).encode()).hexdigest()[:12]}"


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
