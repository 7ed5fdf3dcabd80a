"""The projections and the embedding, dense and over quantized weights.

A quantized module replaces the dense one of its shape and has the same methods. Its arrays have mlx-lm's names:
`weight`, `scales` and, of affine, `biases`; they are frozen, and gradients pass to the inputs only.

Shape suffixes: D model width, O rows (outputs), N columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_afm.errors import ConfigError
from mlx_afm.model.lora import LoRAFusedLinear, LoRALinear
from mlx_afm.model.packed import Packed
from mlx_afm.quant.scheme import BALANCED, Scheme


def _initial_weight(output_dims: int, input_dims: int) -> mx.array:
    return mx.random.normal((output_dims, input_dims), scale=1 / math.sqrt(input_dims))


class Linear(nn.Linear):
    """A linear layer without bias that knows its adapted form."""

    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__(input_dims, output_dims, bias=False)
        self.weight = _initial_weight(output_dims, input_dims)

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the projection of x: one kernel, rounded once."""
        return mx.addmm(residual, x, self.weight.T)

    def to_lora(self, r: int = 32, scale: float = 0.5, dropout: float = 0.0, key: mx.array | None = None) -> LoRALinear:
        """This layer with a low-rank update of rank r (argument names are mlx-lm's)."""
        return LoRALinear(self, r, scale=scale, dropout=dropout, key=key)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This layer over quantized weights (argument names are mlx-lm's)."""
        return quantize_module(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> Linear:
        """A layer of the same form with another weight."""
        other = Linear(1, 1)
        other.weight = weight
        return other


def queries_keys_values(
    rows: Callable[[mx.array, slice], mx.array], q_dims: int, kv_dims: int, x: mx.array, x_queries: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x.

    Args:
        rows: the projection of an input to some rows of the matrix, which holds the three one after the other.
        q_dims, kv_dims: how many rows make queries, and keys or values.
    """
    if x_queries is None:
        q, k, v = mx.split(rows(x, slice(None)), [q_dims, q_dims + kv_dims], axis=-1)
    else:
        q = rows(x_queries, slice(0, q_dims))
        k, v = mx.split(rows(x, slice(q_dims, None)), 2, axis=-1)
    return q, k, v


class FusedLinear(nn.Module):
    """One matrix that makes queries, keys and values; its rows are in this order.

    A module of its own, not an `nn.Linear`: it returns three arrays, and everything that replaces
    linear layers by their class must leave it alone.
    """

    def __init__(self, input_dims: int, q_dims: int, kv_dims: int) -> None:
        super().__init__()
        self.q_dims, self.kv_dims = q_dims, kv_dims
        self.weight = _initial_weight(q_dims + 2 * kv_dims, input_dims)

    @property
    def input_dims(self) -> int:
        """Width of the input."""
        return int(self.weight.shape[-1])

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        return queries_keys_values(self.rows, self.q_dims, self.kv_dims, x, x_queries)

    def rows(self, x: mx.array, rows: slice) -> mx.array:
        """The product of x with some rows of the matrix, not split."""
        weight = self.weight if rows == slice(None) else self.weight[rows]
        return x @ weight.T

    def to_lora(
        self,
        r: int = 32,
        scale: float = 0.5,
        dropout: float = 0.0,
        parts: tuple[str, ...] = ("q", "k", "v"),
        key: mx.array | None = None,
    ) -> LoRAFusedLinear:
        """This layer with a low-rank update of rank r for each of `parts`."""
        return LoRAFusedLinear(self, r, scale=scale, dropout=dropout, parts=parts, key=key)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This layer over quantized weights (argument names are mlx-lm's)."""
        return quantize_module(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> FusedLinear:
        """A layer of the same form with another weight."""
        other = FusedLinear(1, self.q_dims, self.kv_dims)
        other.weight = weight
        return other


class Embedding(nn.Embedding):
    """The embedding, which is also the head, that knows its quantized form."""

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **others: Any
    ) -> nn.Module:
        """This table over quantized weights (argument names are mlx-lm's)."""
        return quantize_module(self, group_size, bits, mode, **others)

    def with_weight(self, weight: mx.array) -> Embedding:
        """A table of the same form with another weight."""
        other = Embedding(1, 1)
        other.weight = weight
        return other


class Quantized(nn.Module):
    """What every module over codes has.

    Args:
        packed: the matrix.
        dtype: of the model: of its dense form, and of what an embedding gives.
    """

    def __init__(self, packed: Packed, dtype: mx.Dtype) -> None:
        super().__init__()
        self.scheme, self.dtype = packed.scheme, dtype
        self.weight, self.scales = packed.weight, packed.scales
        if packed.biases is not None:
            self.biases = packed.biases
        self.freeze()

    @property
    def packed(self) -> Packed:
        """The matrix."""
        return Packed(self.scheme, self.weight, self.scales, self.get("biases"))

    @property
    def input_dims(self) -> int:
        """Width of the input."""
        return self.packed.columns

    @property
    def group_size(self) -> int:
        """mlx-lm's name for the scheme's."""
        return self.scheme.group_size

    @property
    def bits(self) -> int:
        """mlx-lm's name for the scheme's."""
        return self.scheme.bits

    @property
    def mode(self) -> str:
        """mlx-lm's name for the scheme's."""
        return self.scheme.mode

    def dense_weight(self) -> mx.array:
        """The matrix in the model's dtype."""
        return self.packed.dense(self.dtype)

    def with_weight(self, weight: mx.array) -> nn.Module:
        """A dense module of the same form with this weight."""
        raise NotImplementedError

    def dequantized(self) -> nn.Module:
        """The dense module."""
        return self.with_weight(self.dense_weight())

    def _extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.input_dims}, {self.scheme}"


class QuantizedLinear(Quantized):
    """A linear layer over quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        """The projection of x (..., N), in its dtype."""
        return self.packed.times(x)

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + the projection of x, rounded once."""
        return self.packed.times(x, residual)

    def to_lora(self, r: int = 32, scale: float = 0.5, dropout: float = 0.0, key: mx.array | None = None) -> LoRALinear:
        """This layer with a low-rank update of rank r."""
        return LoRALinear(self, r, scale=scale, dropout=dropout, key=key)

    def with_weight(self, weight: mx.array) -> Linear:
        """A dense layer of the same form with this weight."""
        return Linear(1, 1).with_weight(weight)


class BalancedLinear(QuantizedLinear):
    """A linear layer whose weights are {-1.5, -0.5, 0.5, 1.5} times a scale per row."""


class QuantizedFusedLinear(Quantized):
    """The projection to queries, keys and values over quantized weights; see `FusedLinear`."""

    def __init__(self, packed: Packed, dtype: mx.Dtype, q_dims: int, kv_dims: int) -> None:
        super().__init__(packed, dtype)
        self.q_dims, self.kv_dims = q_dims, kv_dims

    def __call__(self, x: mx.array, x_queries: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of x; with `x_queries`, queries of that and the rest of x."""
        return queries_keys_values(self.rows, self.q_dims, self.kv_dims, x, x_queries)

    def rows(self, x: mx.array, rows: slice) -> mx.array:
        """The product of x with some rows of the matrix, not split."""
        packed = self.packed
        return (packed if rows == slice(None) else packed[rows]).times(x)

    def to_lora(
        self,
        r: int = 32,
        scale: float = 0.5,
        dropout: float = 0.0,
        parts: tuple[str, ...] = ("q", "k", "v"),
        key: mx.array | None = None,
    ) -> LoRAFusedLinear:
        """This layer with a low-rank update of rank r for each of `parts`."""
        return LoRAFusedLinear(self, r, scale=scale, dropout=dropout, parts=parts, key=key)

    def with_weight(self, weight: mx.array) -> FusedLinear:
        """A dense layer of the same form with this weight."""
        return FusedLinear(1, self.q_dims, self.kv_dims).with_weight(weight)


class QuantizedEmbedding(Quantized):
    """The embedding over quantized weights, which is also the head."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Rows of the table (..., D), in the model's dtype."""
        return self.packed[tokens].dense(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of hidden states (..., D)."""
        return self.packed.times(x)

    def with_weight(self, weight: mx.array) -> Embedding:
        """A dense embedding with this weight."""
        return Embedding(1, 1).with_weight(weight)


Dense = Linear | FusedLinear | Embedding


def quantized(module: Dense, packed: Packed, dtype: mx.Dtype) -> Quantized:
    """The quantized form of a dense module, over given codes."""
    if isinstance(module, Embedding):
        return QuantizedEmbedding(packed, dtype)
    if isinstance(module, FusedLinear):
        return QuantizedFusedLinear(packed, dtype, module.q_dims, module.kv_dims)
    return (BalancedLinear if packed.scheme.mode == BALANCED else QuantizedLinear)(packed, dtype)


def quantize_module(module: Dense, group_size: int | None, bits: int | None, mode: str, **others: Any) -> Quantized:
    """The quantized form of a dense module: what `to_quantized` does.

    Nothing is computed until it is needed: mlx-lm's loader quantizes random weights first and then puts
    those of the file in their place.

    Raises:
        ConfigError: a scheme MLX does not have, or a width that its groups do not divide.
    """
    if others.get("quantize_input"):
        raise ConfigError("quantized activations are not supported", advice="Quantize the weights alone.")
    scheme = Scheme(mode=mode, bits=bits, group_size=group_size)  # type: ignore[arg-type]
    weight = module.weight
    if not scheme.fits(weight.shape[1]):
        expected = f"a multiple of the group size {scheme.group_size}"
        raise ConfigError("a matrix that cannot be cut into groups", expected=expected, found=weight.shape[1])
    return quantized(module, pack(weight, scheme), weight.dtype)


def pack(weight: mx.array, scheme: Scheme) -> Packed:
    """A dense matrix (O, N), quantized; see `quant.balanced` for what balanced does, here in float32 and lazily."""
    if scheme.mode != BALANCED:
        return Packed(scheme, *mx.quantize(weight, **scheme.to_dict()))
    magnitudes = mx.abs(weight.astype(mx.float32))
    scales = _balanced_scales(magnitudes, weight.dtype)
    large = magnitudes > scales[:, None]
    codes = mx.where(weight < 0, mx.where(large, 0, 1), mx.where(large, 3, 2)).astype(mx.uint32)
    shifts = mx.arange(0, 32, 2, dtype=mx.uint32)
    words = (codes.reshape(len(codes), -1, 16) << shifts).sum(axis=-1).astype(mx.uint32)
    return Packed(scheme, words, scales)


def _balanced_scales(magnitudes_ON: mx.array, dtype: mx.Dtype) -> mx.array:
    """Scales (O,): twice the least magnitude of rows on a grid, of least squared error elsewhere."""
    on_grid = 2 * magnitudes_ON.min(axis=1, keepdims=True)
    large = (1.5 * on_grid).astype(dtype).astype(mx.float32)
    exact = mx.all((magnitudes_ON == 0.5 * on_grid) | (magnitudes_ON == large), axis=1)
    sums = mx.cumsum(mx.sort(magnitudes_ON, axis=1), axis=1)
    numerator = 1.5 * sums[:, -1:] - sums
    denominator = 2.25 * sums.shape[1] - 2 * mx.arange(1, sums.shape[1] + 1)
    best = mx.argmax(numerator * numerator / denominator, axis=1, keepdims=True)
    fitted = mx.take_along_axis(numerator, best, axis=1)[:, 0] / denominator[best[:, 0]]
    return mx.where(exact, on_grid[:, 0], fitted)


def quantize_modules(model: nn.Module, schemes: Mapping[str, Scheme], dtype: mx.Dtype) -> None:
    """Puts quantized modules of zeros in place of dense ones, for weights to be loaded into.

    Raises:
        ConfigError: a path where there is nothing to quantize, or widths that do not fit.
    """
    modules, replaced = dict(model.named_modules()), []
    for path, scheme in schemes.items():
        module = modules.get(path)
        if not isinstance(module, (Linear, FusedLinear, Embedding)):
            raise ConfigError("nothing to quantize there", where=path)
        rows, columns = module.weight.shape
        if not scheme.fits(columns):
            expected = f"a multiple of the group size {scheme.group_size}"
            raise ConfigError("a width that its groups do not divide", where=path, expected=expected, found=columns)
        name = str(dtype).removeprefix("mlx.core.")
        arrays = [mx.zeros(shape, getattr(mx, kind)) for kind, shape in scheme.arrays(rows, columns, name).values()]
        replaced.append((path, quantized(module, Packed(scheme, *arrays), dtype)))
    model.update_modules(tree_unflatten(replaced))


def is_quantized(model: nn.Module) -> bool:
    """Whether any weights are codes."""
    return any(isinstance(module, Quantized) for module in model.modules())


def dequantize_modules(model: nn.Module) -> None:
    """Puts dense modules in place of all quantized ones."""
    dense = [(path, module.dequantized()) for path, module in model.named_modules() if isinstance(module, Quantized)]
    if dense:
        model.update_modules(tree_unflatten(dense))
