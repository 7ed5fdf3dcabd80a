"""Adapters in their inference form: several of them side by side on one projection, chosen for each row of a batch.

In every module the adapters' matrices lie one behind the other along the rank: A (W, D) and B (W, O), in the model's
dtype, with the scale folded into B; of gate and up (2, W, D) and (2, W, O). A call names windows of them. The base
product is computed once for all rows, and so are those of a window: where a row has another adapter than a column of
x A, the column is zero for it. A step of one token a row leaves L out.

Shape suffixes: B batch, L tokens, D inputs, W width of a window (the sum of its ranks), O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model.projections import queries_keys_values

# Of a window in one module: A (D, W), B (W, O), and the columns that each row uses (B, W), None for all. A and B of
# gate and up have two of these in front.
LowRank = tuple[mx.array, mx.array, mx.array | None]
Routes = Sequence[Mapping[str, LowRank]]  # by window, by the path of the module


class LowRankStack:
    """The matrices of all adapters in one module.

    Attributes:
        widths: rows of each adapter in both arrays, by its name, in their order.
        lora_a, lora_b: (W, D) and (W, O), or with two in front; None without adapters.
    """

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}
        self.lora_a: mx.array | None = None
        self.lora_b: mx.array | None = None

    def append(self, name: str, a_RD: mx.array, b_RO: mx.array) -> None:
        """Puts an adapter's matrices behind the others."""
        if self.lora_a is not None and self.lora_b is not None:
            a, b = mx.concatenate([self.lora_a, a_RD], axis=-2), mx.concatenate([self.lora_b, b_RO], axis=-2)
        else:
            a, b = mx.contiguous(a_RD), mx.contiguous(b_RO)
        mx.eval(a, b)
        self.lora_a, self.lora_b = a, b
        self.widths[name] = b_RO.shape[-2]

    def remove(self, name: str) -> None:
        """Takes an adapter's matrices out."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        start, end = self._bounds([name])
        del self.widths[name]
        if not self.widths:
            self.lora_a = self.lora_b = None
            return
        rows = mx.array([row for row in range(self.lora_b.shape[-2]) if not start <= row < end])
        # `take` copies; a slice, also in a concatenation with nothing else, would hold the old buffer.
        kept = mx.take(self.lora_a, rows, axis=-2), mx.take(self.lora_b, rows, axis=-2)
        mx.eval(kept)
        self.lora_a, self.lora_b = kept

    def window(self, names: Sequence[str]) -> tuple[mx.array, mx.array]:
        """A (D, W) and B (W, O) of adapters that lie beside each other: views, so that a step makes none."""
        assert self.lora_a is not None
        assert self.lora_b is not None
        start, end = self._bounds(names)
        views = self.lora_a[..., start:end, :].swapaxes(-1, -2), self.lora_b[..., start:end, :]
        mx.eval(views)
        return views

    def _bounds(self, names: Sequence[str]) -> tuple[int, int]:
        """The first row of some neighbours, and the one behind the last."""
        start = 0
        for name, width in self.widths.items():
            if name == names[0]:
                break
            start += width
        return start, start + sum(self.widths[name] for name in names)


@dataclass
class Routing:
    """The windows that the current call adds, shared by all modules."""

    routes: Routes = ()


def _plus_low_rank(y: mx.array, x: mx.array, a_DW: mx.array, b_WO: mx.array, mask_BW: mx.array | None) -> mx.array:
    """y (B, L, O) + the rows' low-rank products of x (B, L, D); of one token a row, (B, O) and (B, D)."""
    inner = x @ a_DW
    if mask_BW is not None:  # not a product: what another row's adapter makes of this one may be infinite
        inner = mx.where(mask_BW if x.ndim == 2 else mask_BW[:, None], inner, 0)
    return mx.addmm(y, inner, b_WO)


def _plus_low_rank_pair(
    gate: mx.array, up: mx.array, x: mx.array, a_2DW: mx.array, b_2WO: mx.array, mask_BW: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Gate and up (B, L, F) + their low-rank products of x (B, L, D); of one token a row, (B, F) and (B, D)."""
    shape = gate.shape
    inner_2MW = x.reshape(1, -1, x.shape[-1]) @ a_2DW
    if mask_BW is not None:
        inner_2BLW = inner_2MW.reshape(2, shape[0], -1, mask_BW.shape[-1])
        inner_2MW = mx.where(mask_BW[:, None], inner_2BLW, 0).reshape(inner_2MW.shape)
    more_gate, more_up = mx.split(inner_2MW @ b_2WO, 2)
    return gate + more_gate.reshape(shape), up + more_up.reshape(shape)


class Adaptable(nn.Module):
    """A projection that takes adapters.

    Args:
        linear: the base projection; adapters and base never share arrays.
        routing: says what the current call adds.
        path: of the module, by which that is found.
    """

    def __init__(self, linear: nn.Module, routing: Routing, path: str) -> None:
        super().__init__()
        self.linear, self.path = linear, path
        self._routing = routing

    def _used(self) -> list[LowRank]:
        return [window[self.path] for window in self._routing.routes if self.path in window]


class AdaptedLinear(Adaptable):
    """A linear layer and its adapters."""

    def __call__(self, x_BLD: mx.array) -> mx.array:
        """The adapted projection (B, L, O)."""
        y = self.linear(x_BLD)
        for a, b, mask in self._used():
            y = _plus_low_rank(y, x_BLD, a, b, mask)
        return y

    def plus(self, x_BLD: mx.array, residual_BLO: mx.array) -> mx.array:
        """residual + the adapted projection."""
        y = self.linear.plus(x_BLD, residual_BLO)
        for a, b, mask in self._used():
            y = _plus_low_rank(y, x_BLD, a, b, mask)
        return y


class AdaptedFusedLinear(Adaptable):
    """The projection to queries, keys and values and its adapters: A of the parts joined, B one block matrix."""

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        return queries_keys_values(self._rows, self.linear.q_dims, self.linear.kv_dims, x, x_queries)

    def _rows(self, x_BLD: mx.array, rows: slice) -> mx.array:
        y = self.linear.rows(x_BLD, rows)
        for a, b, mask in self._used():
            y = _plus_low_rank(y, x_BLD, a, b if rows == slice(None) else b[:, rows], mask)
        return y


class AdaptedGateUp(Adaptable):
    """The joined gate and up projections and their adapters."""

    def __call__(self, x_BLD: mx.array) -> tuple[mx.array, mx.array]:
        """Both, each (B, L, F)."""
        gate, up = self.linear(x_BLD)
        for a, b, mask in self._used():
            gate, up = _plus_low_rank_pair(gate, up, x_BLD, a, b, mask)
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
