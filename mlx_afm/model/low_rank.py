"""Adapters in their inference form: several of them side by side on one projection, chosen for each row of a batch.

Adapters with the same rank and the same adapted modules form a bucket. In every module their matrices lie in one
stack, a slot each: A (N, D, R) and B (N, R, O), in the model's dtype, with the scale folded into B. The base product is
computed once for all rows; each row's low-rank product takes its own slot. A step of one token a row leaves L out.

Shape suffixes: B batch, L tokens, D inputs, R rank, O outputs, N slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model import backend
from mlx_afm.model.layers import queries_keys_values

Bucket = str


class LowRankStack:
    """The matrices of one bucket's adapters in one module.

    Args:
        lora_a_NDR: of gate and up, A of both joined, (N, D, 2 R).
        lora_b_NRO: of gate and up, B of both one after the other, (2 N, R, O).

    Attributes:
        slots: of each slot A (D, R) and B (R, O), or (2, R, O) of gate and up: views, so that a step makes none.
    """

    def __init__(self, lora_a_NDR: mx.array, lora_b_NRO: mx.array) -> None:
        self.lora_a, self.lora_b = lora_a_NDR, lora_b_NRO
        count, wide = lora_a_NDR.shape[0], lora_b_NRO.shape[0] > lora_a_NDR.shape[0]
        self.slots = [
            (_view(lora_a_NDR, slot), lora_b_NRO[2 * slot : 2 * slot + 2] if wide else _view(lora_b_NRO, slot))
            for slot in range(count)
        ]
        mx.eval(self.slots)


def _view(stack_NXY: mx.array, slot: int) -> mx.array:
    """The matrix of one slot: a view, where an index would be a copy."""
    return stack_NXY[slot : slot + 1].squeeze(0)


@dataclass(frozen=True)
class Slots:
    """Which slot of a bucket's stacks each row of a batch uses.

    Attributes:
        stacks: of the bucket, by the path of the module; looked up at each call. Instead of a stack there may be the
            matrices themselves.
        index: one slot for all rows, or int32 (B,); None for the only one, whose matrices are given.
        mask_B: bool, the rows that have an adapter of this bucket; None for all.
    """

    stacks: Mapping[str, LowRankStack | tuple[mx.array, mx.array]]
    index: int | mx.array | None
    mask_B: mx.array | None = None

    def matrices(self, path: str) -> tuple[mx.array, mx.array] | None:
        """A and B in one module: of the slot, or all of them where rows have their own; None if it has no adapter."""
        stack = self.stacks.get(path)
        if stack is None or isinstance(stack, tuple):
            return stack
        return stack.slots[self.index] if isinstance(self.index, int) else (stack.lora_a, stack.lora_b)


@dataclass
class Routing:
    """The slots of the rows of the current call, by bucket; what is not named is not added. Shared by all modules."""

    slots: Mapping[Bucket, Slots] = field(default_factory=dict)


def _plus_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array, slots: Slots) -> mx.array:
    """y (B, L, O) + the rows' low-rank products of x (B, L, D); of one token a row, (B, O) and (B, D)."""
    if not isinstance(slots.index, mx.array):
        return mx.addmm(y, x @ a, b)
    if x.ndim == 2:
        return _plus_low_rank(y[:, None], x[:, None], a, b, slots)[:, 0]
    inner_BLR = backend.gather_product(x, a, slots.index)
    added = backend.gather_product(inner_BLR, b, slots.index)
    return y + (added if slots.mask_B is None else mx.where(slots.mask_B[:, None, None], added, 0))


def _plus_low_rank_pair(
    gate: mx.array, up: mx.array, x: mx.array, a: mx.array, b: mx.array, slots: Slots
) -> tuple[mx.array, mx.array]:
    """Gate and up (B, L, F) + their low-rank products of x (B, L, D); of one token a row, (B, F) and (B, D)."""
    rank, shape = b.shape[1], gate.shape
    if not isinstance(slots.index, mx.array):
        inner = x @ a
        inner_2MR = inner.reshape(2, 1, rank) if inner.size == 2 * rank else inner.reshape(-1, 2, rank).swapaxes(0, 1)
        more_gate, more_up = mx.split(inner_2MR @ b, 2)
        return gate + more_gate.reshape(shape), up + more_up.reshape(shape)
    batch = shape[0]
    inner_BLR = backend.gather_product(x.reshape(batch, -1, x.shape[-1]), a, slots.index)
    inner_B2LR = inner_BLR.reshape(batch, -1, 2, rank).swapaxes(1, 2)
    index_B2 = 2 * slots.index[:, None] + mx.arange(2)
    added_B2LF = backend.gather_product(inner_B2LR, b, index_B2)
    if slots.mask_B is not None:
        added_B2LF = mx.where(slots.mask_B[:, None, None, None], added_B2LF, 0)
    more_gate, more_up = mx.split(added_B2LF, 2, axis=1)
    return gate + more_gate.reshape(shape), up + more_up.reshape(shape)


class Adaptable(nn.Module):
    """A projection that takes adapters.

    Args:
        linear: the base projection; adapters and base never share arrays.
        routing: says which slots the rows use.
        path: of the module, by which stacks are found.
    """

    def __init__(self, linear: nn.Module, routing: Routing, path: str) -> None:
        super().__init__()
        self.linear, self.path = linear, path
        self._routing = routing

    def _used(self) -> list[tuple[mx.array, mx.array, Slots]]:
        found = ((slots.matrices(self.path), slots) for slots in self._routing.slots.values())
        return [(*matrices, slots) for matrices, slots in found if matrices is not None]


class AdaptedLinear(Adaptable):
    """A linear layer and its adapters."""

    def __call__(self, x_BLD: mx.array) -> mx.array:
        """The adapted projection (B, L, O)."""
        y = self.linear(x_BLD)
        for a, b, slots in self._used():
            y = _plus_low_rank(y, x_BLD, a, b, slots)
        return y

    def plus(self, x_BLD: mx.array, residual_BLO: mx.array) -> mx.array:
        """residual + the adapted projection."""
        y = self.linear.plus(x_BLD, residual_BLO)
        for a, b, slots in self._used():
            y = _plus_low_rank(y, x_BLD, a, b, slots)
        return y


class AdaptedFusedLinear(Adaptable):
    """The projection to queries, keys and values and its adapters: A of the parts joined, B one block matrix."""

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        return queries_keys_values(self._rows, self.linear.q_dims, self.linear.kv_dims, x, x_queries)

    def _rows(self, x_BLD: mx.array, rows: slice) -> mx.array:
        y = self.linear.rows(x_BLD, rows)
        for a, b, slots in self._used():
            y = _plus_low_rank(y, x_BLD, a, b if rows == slice(None) else b[..., rows], slots)
        return y


class AdaptedGateUp(Adaptable):
    """The joined gate and up projections and their adapters."""

    def __call__(self, x_BLD: mx.array) -> tuple[mx.array, mx.array]:
        """Both, each (B, L, F)."""
        gate, up = self.linear(x_BLD)
        for a, b, slots in self._used():
            gate, up = _plus_low_rank_pair(gate, up, x_BLD, a, b, slots)
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
        return queries_keys_values(self._rows, self.linear.q_dims, self.linear.kv_dims, x, x_queries)

    def _rows(self, x: mx.array, rows: slice) -> mx.array:
        y = mx.addmm(self.linear.rows(x, rows), x @ self.lora_a, self.lora_b[:, rows])
        return y * self.factor[rows]
