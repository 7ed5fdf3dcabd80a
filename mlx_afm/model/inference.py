"""The inference form of a model: the same arrays in modules that launch fewer kernels.

Gate and up become one product, adapters are cast to the model's dtype once and their scale is folded into B, and
nothing is kept for gradients. The model itself stays as it is: it can still be trained, fused and saved exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_afm.model import backend
from mlx_afm.model.cpu.layout import lay_out_for_decoding
from mlx_afm.model.dora import DoRAFusedLinear, DoRALinear, adapted_lengths, dense_weight
from mlx_afm.model.layers import FeedForward, RMSNorm
from mlx_afm.model.lora import PARTS, LoRAFusedLinear, LoRALinear
from mlx_afm.model.low_rank import (
    Adaptable,
    AdaptedFusedLinear,
    AdaptedGateUp,
    AdaptedLinear,
    MagnitudeFusedLinear,
    MagnitudeLinear,
    Routing,
)
from mlx_afm.model.model import Model
from mlx_afm.model.packed import Packed
from mlx_afm.model.projections import FusedLinear, Linear, Quantized, QuantizedFusedLinear, QuantizedLinear, quantized
from mlx_afm.quant.scheme import BALANCED


class InferenceModel:
    """A model in its inference form.

    Args:
        model: its LoRA adapter, if it has one, is left out: `adapters.inference` adds it. DoRA layers are kept.
        beside: another inference form of this model, whose joined gate and up weights are used here too, so that they
            are in memory once.

    Attributes:
        model: a `Model` that shares its arrays with the given one. Its modules take adapters, see `low_rank`.
        routing: which adapters the rows of a call use.
        dtype: of the computation.

    Cost: one transient copy of a layer's gate and up weights on a GPU, whose two matrices are views of one afterwards;
        on the CPU the layout of `cpu.layout`.
    """

    def __init__(self, model: Model, *, beside: InferenceModel | None = None) -> None:
        lay_out_for_decoding(model)
        # By the ids of both weights, which are kept here so that no other arrays can have these ids.
        self._joined: dict[tuple[int, int], tuple[list[mx.array], GateUpLinear]] = beside._joined if beside else {}
        self.routing = Routing()
        self.dtype = model.head.dtype if isinstance(model.head, Quantized) else model.head.weight.dtype
        self.model: Model = self._form(model, ())
        self.model.eval()

    @property
    def quantizer_steps(self) -> list[tuple[mx.array, mx.array]]:
        """Steps of each full layer's key and value quantizers, float32 scalars; empty if the model has none."""
        attentions = [layer.self_attn for layer in self.model.model.layers]
        return [(at.quant_key_scale, at.quant_value_scale) for at in attentions if "quant_key_scale" in at]

    @contextmanager
    def with_quantizer_steps(self, steps: Sequence[tuple[mx.array, mx.array]]) -> Iterator[None]:
        """Other steps for a while: those of a trace, which would take single values into the text of its kernels."""
        held = self.quantizer_steps
        self._put_steps(steps)
        try:
            yield
        finally:
            self._put_steps(held)

    def _put_steps(self, steps: Sequence[tuple[mx.array, mx.array]]) -> None:
        for layer, (key_step, value_step) in zip(self.model.model.layers, steps):
            layer.self_attn.quant_key_scale, layer.self_attn.quant_value_scale = key_step, value_step

    def adaptable(self) -> dict[str, Adaptable]:
        """The modules that take adapters, by path."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, Adaptable)}

    def _form(self, module: nn.Module, path: tuple[str, ...]) -> Any:
        """The inference form of the module at a path and of all within it."""
        if isinstance(module, (LoRALinear, LoRAFusedLinear)):
            module = module.linear
        if isinstance(module, (DoRALinear, DoRAFusedLinear)):
            return self._with_magnitudes(module)
        if isinstance(module, (Linear, QuantizedLinear)):
            return AdaptedLinear(_held(module), self.routing, ".".join(path))
        if isinstance(module, RMSNorm) and module.weight.dtype != self.dtype:
            norm = _shallow(module)
            norm.weight = module.weight.astype(self.dtype)
            return norm
        if isinstance(module, (FusedLinear, QuantizedFusedLinear)):
            return AdaptedFusedLinear(_held(module), self.routing, ".".join(path))
        formed = _shallow(module)
        joined = self._join(module) if isinstance(module, FeedForward) and not backend.on_cpu() else None
        for name, child in module.children().items():
            if joined is not None and name in ("gate_proj", "up_proj"):
                del formed[name]
            else:
                formed[name] = self._form_child(child, (*path, name))
        if joined is not None:
            formed.gate_up_proj = AdaptedGateUp(joined, self.routing, ".".join((*path, "gate_up_proj")))
        return formed

    def _form_child(self, child: Any, path: tuple[str, ...]) -> Any:
        if isinstance(child, list):
            return [self._form(item, (*path, str(number))) for number, item in enumerate(child)]
        return self._form(child, path)

    def _join(self, module: FeedForward) -> GateUpLinear | None:
        """Gate and up as one projection, joined once for all inference forms beside each other."""
        pair = [_base(projection).get("weight") for projection in (module.gate_proj, module.up_proj)]
        held = self._joined.get((id(pair[0]), id(pair[1])))
        if held is not None:
            return held[1]
        joined = _joined(module)
        if joined is not None:
            views = [_base(projection).weight for projection in (module.gate_proj, module.up_proj)]
            self._joined[id(views[0]), id(views[1])] = views, joined
        return joined

    def _with_magnitudes(self, module: Any) -> MagnitudeLinear:
        """A DoRA layer with its magnitudes divided by the lengths of the adapted rows, once."""
        if isinstance(module, DoRALinear):
            weight = dense_weight(module.linear)
            lengths = adapted_lengths(weight, module._squares, module.lora_a, module.lora_b, module.scale)
            arrays = module.lora_a, module.scale * module.lora_b, module.m / lengths
            return MagnitudeLinear(_held(module.linear), *(array.astype(self.dtype) for array in arrays))
        rows = dict(zip(PARTS, module._rows()))
        pairs = {part: module[part] for part in PARTS if part in module}
        factors = [
            pairs[part].m
            / adapted_lengths(rows[part], pairs[part]._squares, pairs[part].lora_a, pairs[part].lora_b, module.scale)
            if part in pairs
            else mx.ones(len(rows[part]))
            for part in PARTS
        ]
        sizes = {part: len(rows[part]) for part in PARTS}
        a, b = fused_matrices({part: (pair.lora_a, module.scale * pair.lora_b) for part, pair in pairs.items()}, sizes)
        arrays = a, b, mx.concatenate(factors)
        return MagnitudeFusedLinear(_held(module.linear), *(array.astype(self.dtype) for array in arrays))


def fused_matrices(pairs: dict[str, tuple[mx.array, mx.array]], sizes: dict[str, int]) -> tuple[mx.array, mx.array]:
    """A of some parts of the fused projection joined, (D, P R), and their B as one block matrix, (P R, O).

    Args:
        pairs: A (D, R) and B (R, O of the part) of each part that has them.
        sizes: outputs of every part, in the order of the matrix.
    """
    rows = []
    for part, (_, b) in pairs.items():
        blocks = [b if other == part else mx.zeros((b.shape[0], size), b.dtype) for other, size in sizes.items()]
        rows.append(mx.concatenate(blocks, axis=1))
    return mx.concatenate([a for a, _ in pairs.values()], axis=1), mx.concatenate(rows)


class TransposedLinear(nn.Module):
    """A dense projection that holds its matrix as (inputs, outputs): a view that no step has to make.

    Args:
        linear: a projection, or the one to queries, keys and values.
    """

    def __init__(self, linear: Linear | FusedLinear) -> None:
        super().__init__()
        self.weight_DO = linear.weight.T
        mx.eval(self.weight_DO)
        if isinstance(linear, FusedLinear):
            self.q_dims, self.kv_dims = linear.q_dims, linear.kv_dims

    def __call__(self, x: mx.array) -> mx.array:
        """The projection of x (..., D)."""
        return x @ self.weight_DO

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the projection of x: one kernel, rounded once."""
        return mx.addmm(residual, x, self.weight_DO)

    def rows(self, x: mx.array, rows: slice) -> mx.array:
        """The projection to some of the outputs."""
        return x @ (self.weight_DO if rows == slice(None) else self.weight_DO[:, rows])


class GateUpLinear(nn.Module):
    """Gate and up as one product; `linear` holds the rows of both, one after the other."""

    def __init__(self, linear: Linear | QuantizedLinear) -> None:
        super().__init__()
        self.linear = _held(linear)
        if isinstance(linear, QuantizedLinear) and linear.scheme.mode == BALANCED:
            self.halves = mx.split(linear.packed.unit_scales(linear.dtype), 2)
            mx.eval(self.halves)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Both, each (..., F)."""
        if "halves" in self and not backend.on_cpu():  # each half is scaled in the kernel that reads it
            gate, up = mx.split(self.linear.packed.unscaled(x), 2, axis=-1)
            return _times(gate, self.halves[0]), _times(up, self.halves[1])
        gate, up = mx.split(self.linear(x), 2, axis=-1)
        return gate, up


@backend.one_kernel
def _times(y: mx.array, scales: mx.array) -> mx.array:
    return (y.astype(mx.float32) * scales).astype(y.dtype)


def _joined(module: FeedForward) -> GateUpLinear | None:
    """Gate and up as one projection; the weights of the two become views of it. None if their forms differ."""
    gate, up = (_base(projection) for projection in (module.gate_proj, module.up_proj))
    if isinstance(gate, Linear) and isinstance(up, Linear) and gate.weight.dtype == up.weight.dtype:
        joined: Linear | QuantizedLinear = gate.with_weight(mx.concatenate([gate.weight, up.weight]))
        names = ["weight"]
    elif isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear) and gate.scheme == up.scheme:
        arrays = [mx.concatenate(list(pair)) for pair in zip(gate.packed.arrays, up.packed.arrays)]
        joined = quantized(Linear(1, 1), Packed(gate.scheme, *arrays), gate.dtype)  # type: ignore[assignment]
        names = ["weight", "scales", "biases"][: len(arrays)]
    else:
        return None
    rows = gate.weight.shape[0]
    for name in names:
        both = joined[name]
        mx.eval(both)
        setattr(gate, name, both[:rows])
        setattr(up, name, both[rows:])
        mx.eval(gate[name], up[name])
    return GateUpLinear(joined)


def _base(module: Any) -> Any:
    return module.linear if isinstance(module, LoRALinear) else module


def _held(module: Any) -> Any:
    """A projection as the inference form holds it."""
    return TransposedLinear(module) if isinstance(module, (Linear, FusedLinear)) else _shallow(module)


def _shallow(module: Any) -> Any:
    """A module of its own with the same arrays and submodules."""
    other = module.__class__.__new__(module.__class__)
    other.__dict__.update(module.__dict__)
    dict.update(other, module)
    return other


def same_arrays(model: Model, arrays: list[mx.array]) -> bool:
    """Whether a model holds exactly these arrays, from `held_arrays`; values are not compared."""
    now = held_arrays(model)
    return len(now) == len(arrays) and all(new is old for new, old in zip(now, arrays))


def held_arrays(model: Model) -> list[mx.array]:
    """All arrays of a model, in the order of its tree."""
    return [array for _, array in tree_flatten(model.parameters())]


__all__ = ["InferenceModel", "QuantizedFusedLinear", "fused_matrices", "held_arrays", "same_arrays"]
