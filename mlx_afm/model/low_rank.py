"""Adapters in their inference form: several of them side by side on one projection, chosen for each row of a batch.

Adapters with the same rank and the same adapted modules form a bucket. In every module their matrices lie in one stack,
a slot each: A (N, D, R) and B (N, R, O), in the model's dtype, with the scale folded into B. The base product is computed
once for all rows; each row's low-rank product takes its own slot.

Shape suffixes: B batch, L tokens, D inputs, R rank, O outputs, N slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model import backend

Bucket = str


@dataclass(frozen=True)
class Slots:
    """Which slot of a bucket's stacks each row of a batch uses.

    Attributes:
        index: one slot for all rows, or int32 (B,).
        mask_B11: bool (B, 1, 1), the rows that have an adapter of this bucket; None for all.
    """

    index: int | mx.array
    mask_B11: mx.array | None = None


@dataclass
class Routing:
    """The slots of the rows of the current call, by bucket; what is not named is not added. Shared by all modules."""

    slots: Mapping[Bucket, Slots] = field(default_factory=dict)


class LowRankStack(nn.Module):
    """The matrices of one bucket's adapters in one module."""

    def __init__(self, lora_a_NDR: mx.array, lora_b_NRO: mx.array) -> None:
        super().__init__()
        self.lora_a, self.lora_b = lora_a_NDR, lora_b_NRO

    def add_to(self, y: mx.array, x_BLD: mx.array, slots: Slots, outputs: slice = slice(None)) -> mx.array:
        """y (B, L, O) + the rows' low-rank products of x; with `outputs`, of these columns of B only."""
        if isinstance(slots.index, int):
            a_DR, b_RO = _slot(self.lora_a, slots.index), _slot(self.lora_b, slots.index)
            return mx.addmm(y, x_BLD @ a_DR, b_RO if outputs == slice(None) else b_RO[:, outputs])
        inner_BLR = backend.gather_product(x_BLD, self.lora_a, slots.index)
        added = backend.gather_product(inner_BLR, self.lora_b, slots.index)[..., outputs]
        return y + (added if slots.mask_B11 is None else mx.where(slots.mask_B11, added, 0))


def _slot(stack_NXY: mx.array, slot: int) -> mx.array:
    """The matrix of one slot: a view, where an index would be a copy."""
    return stack_NXY[slot : slot + 1].squeeze(0)


class PairStack(LowRankStack):
    """The matrices of gate and up: A joined, (N, D, 2 R); B one after the other, (2 N, R, O)."""

    def add_to_both(self, gate: mx.array, up: mx.array, x_BLD: mx.array, slots: Slots) -> tuple[mx.array, mx.array]:
        """Gate and up (B, L, O) + their low-rank products of x."""
        batch, length, _ = x_BLD.shape
        rank = self.lora_b.shape[1]
        if isinstance(slots.index, int):
            inner_BLR = x_BLD @ _slot(self.lora_a, slots.index)
            inner_2MR = inner_BLR.reshape(batch * length, 2, rank).transpose(1, 0, 2)
            added_2MO = inner_2MR @ self.lora_b[2 * slots.index : 2 * slots.index + 2]
            more_gate, more_up = mx.split(added_2MO, 2)
            return gate + more_gate.reshape(gate.shape), up + more_up.reshape(up.shape)
        inner_BLR = backend.gather_product(x_BLD, self.lora_a, slots.index)
        inner_B2LR = inner_BLR.reshape(batch, length, 2, rank).transpose(0, 2, 1, 3)
        index_B2 = 2 * slots.index[:, None] + mx.arange(2)
        added_B2LO = backend.gather_product(inner_B2LR, self.lora_b, index_B2)
        if slots.mask_B11 is not None:
            added_B2LO = mx.where(slots.mask_B11[..., None], added_B2LO, 0)
        more_gate, more_up = mx.split(added_B2LO, 2, axis=1)
        return gate + more_gate.reshape(gate.shape), up + more_up.reshape(up.shape)


class Adaptable(nn.Module):
    """A projection with its stacks of adapters.

    Args:
        linear: the base projection; adapters and base never share arrays.
        routing: says which slots the rows use.
    """

    def __init__(self, linear: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.linear = linear
        self.stacks: dict[Bucket, LowRankStack] = {}
        self._routing = routing

    def _used(self) -> list[tuple[Any, Slots]]:
        return [(self.stacks[name], slots) for name, slots in self._routing.slots.items() if name in self.stacks]


class AdaptedLinear(Adaptable):
    """A linear layer and its adapters."""

    def __call__(self, x_BLD: mx.array) -> mx.array:
        """The adapted projection (B, L, O)."""
        y = self.linear(x_BLD)
        for stack, slots in self._used():
            y = stack.add_to(y, x_BLD, slots)
        return y

    def plus(self, x_BLD: mx.array, residual_BLO: mx.array) -> mx.array:
        """residual + the adapted projection."""
        y = self.linear.plus(x_BLD, residual_BLO)
        for stack, slots in self._used():
            y = stack.add_to(y, x_BLD, slots)
        return y


class AdaptedFusedLinear(Adaptable):
    """The projection to queries, keys and values and its adapters: A of the parts joined, B one block matrix."""

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        q_dims, kv_dims = self.linear.q_dims, self.linear.kv_dims
        if x_queries is None:
            q, k, v = mx.split(self._rows(x, slice(None)), [q_dims, q_dims + kv_dims], axis=-1)
        else:
            q = self._rows(x_queries, slice(0, q_dims))
            k, v = mx.split(self._rows(x, slice(q_dims, None)), 2, axis=-1)
        return q, k, v

    def _rows(self, x_BLD: mx.array, rows: slice) -> mx.array:
        y = self.linear.rows(x_BLD, rows)
        for stack, slots in self._used():
            y = stack.add_to(y, x_BLD, slots, rows)
        return y


class AdaptedGateUp(Adaptable):
    """The joined gate and up projections and their adapters."""

    def __call__(self, x_BLD: mx.array) -> tuple[mx.array, mx.array]:
        """Both, each (B, L, F)."""
        gate, up = self.linear(x_BLD)
        for stack, slots in self._used():
            gate, up = stack.add_to_both(gate, up, x_BLD, slots)
        return gate, up


class MagnitudeLinear(nn.Module):
    """A DoRA layer in its inference form: factor * (W x + B A x), with m / |W + B A| computed once.

    Args:
        linear: the base projection.
        lora_a, lora_b: (D, R) and (R, O), in the model's dtype, the scale folded into B.
        factor: (O,).
    """

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, factor: mx.array) -> None:
        super().__init__()
        self.linear, self.lora_a, self.lora_b, self.factor = linear, lora_a, lora_b, factor

    def __call__(self, x: mx.array) -> mx.array:
        """The adapted projection."""
        return mx.addmm(self.linear(x), x @ self.lora_a, self.lora_b) * self.factor

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the adapted projection."""
        return residual + self(x)


class MagnitudeFusedLinear(MagnitudeLinear):
    """The same for queries, keys and values: A of the parts joined, B one block matrix, factors one after the other."""

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:  # type: ignore[override]
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        q_dims, kv_dims = self.linear.q_dims, self.linear.kv_dims
        if x_queries is None:
            q, k, v = mx.split(self._rows(x, slice(None)), [q_dims, q_dims + kv_dims], axis=-1)
        else:
            q = self._rows(x_queries, slice(0, q_dims))
            k, v = mx.split(self._rows(x, slice(q_dims, None)), 2, axis=-1)
        return q, k, v

    def _rows(self, x: mx.array, rows: slice) -> mx.array:
        y = mx.addmm(self.linear.rows(x, rows), x @ self.lora_a, self.lora_b[:, rows])
        return y * self.factor[rows]
