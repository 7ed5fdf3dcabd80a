"""Trading time for memory: values that are computed again in the backward pass instead of kept.

What is recomputed costs only what its gradient needs, since a lazy graph drops the rest: the products with
frozen weights, nearly all of a layer's time, are not among it as long as their outputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def recomputed(modules: Sequence[nn.Module], function: Callable[..., Any], *arrays: mx.array) -> Any:
    """`function(*arrays)`, of which only what goes in is kept for the backward pass.

    Args:
        modules: every module with trained tensors that `function` uses.
        function: what it closes over gets no gradient; in a loop, bind loop variables.
        arrays: float arrays.

    `mx.checkpoint` would keep what comes out too, since it is what the second computation waits for there; here that
    waits for the gradients of what comes out.

    `Dropout` draws the same numbers both times; other random numbers would be drawn anew. Matrices of LoRA are cast to
    the first array's dtype before, since casts inside would be done twice.
    """
    if not any(module.training for module in modules):
        return function(*arrays)
    held = [tree_flatten(module.trainable_parameters()) for module in modules]
    tensors = [array for named in held for _, array in named]
    keys: list[mx.array] = []  # that dropout drew in the forward pass

    def run(*given: mx.array) -> Any:
        with _replaced(modules, held, given[: len(tensors)]):
            return function(*given[len(tensors) :])

    @mx.custom_function
    def once(given: list[mx.array]) -> Any:
        with _recording(keys):
            return run(*given)

    @once.vjp
    def again(given: list[mx.array], cotangents: Any, _: Any) -> list[mx.array]:
        wanted = list(cotangents) if isinstance(cotangents, (list, tuple)) else [cotangents]
        with _replaying(keys):
            _, gradients = mx.vjp(run, mx.depends(given, wanted), wanted)
        return gradients

    cast = [wanted for module in modules for wanted in _cast_names(module)]
    dtype = arrays[0].dtype
    given = [tensor.astype(dtype) if wanted else tensor for tensor, wanted in zip(tensors, cast)]
    return once([*given, *arrays])  # type: ignore[operator]


def _cast_names(module: nn.Module) -> list[bool]:
    """Of each trained tensor of a module, whether it is used in the dtype of what goes in."""
    owners = {path for path, owner in module.named_modules() if getattr(owner, "computes_in_input_dtype", False)}
    names = [name for name, _ in tree_flatten(module.trainable_parameters())]
    return [name.rpartition(".")[0] in owners for name in names]


@mx.custom_function
def gradient_barrier(*arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays as they are; in the backward pass none of their gradients is used before all are computed.

    For arrays that many layers share, as the reusing layers share keys and values. Their gradient is wanted only when
    the last of these layers has been passed, and a lazy graph puts off what is not wanted: each layer's scores and
    their gradients would be kept until then, far more than all else at 14 layers and 512 tokens (peak 161 MB, with
    this 49 MB; width 128, checkpointing).
    """
    return arrays


@gradient_barrier.vjp
def _all_at_once(_: Any, cotangents: Sequence[mx.array], __: Any) -> tuple[mx.array, ...]:
    return tuple(mx.depends(list(cotangents), list(cotangents)))


@contextmanager
def _replaced(
    modules: Sequence[nn.Module], held: Sequence[Sequence[tuple[str, mx.array]]], tensors: Sequence[mx.array]
) -> Iterator[None]:
    """Puts other tensors in the place of those that modules hold, in the same order, for a while."""
    others = iter(tensors)
    try:
        for module, named in zip(modules, held):
            module.update(tree_unflatten([(name, next(others)) for name, _ in named]))
        yield
    finally:
        for module, named in zip(modules, held):
            module.update(tree_unflatten(list(named)))


class Dropout(nn.Dropout):
    """Dropout that draws the same values when it is recomputed.

    It draws a key from MLX's random state and the values from that key; no value of the state is read, so that a
    training step with it can be compiled.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x with some values zero and the others larger, in training."""
        if self._p_1 == 1 or not self.training:
            return x
        mask = mx.random.bernoulli(self._p_1, x.shape, key=_next_key())
        return (mask * x) / self._p_1


_replayed: list[Iterator[mx.array]] = []  # the keys of what is being recomputed, innermost last
_recorded: list[list[mx.array]] = []  # the keys that were drawn by what will be recomputed, innermost last


def _next_key() -> mx.array:
    if _replayed:
        key = next(_replayed[-1])
    else:
        key = mx.random.randint(0, 1 << 30, (2,), dtype=mx.uint32)
    for keys in _recorded:
        keys.append(key)
    return key


@contextmanager
def _recording(keys: list[mx.array]) -> Iterator[None]:
    """Puts the keys that are drawn meanwhile into a list."""
    _recorded.append(keys)
    try:
        yield
    finally:
        _recorded.pop()


@contextmanager
def _replaying(keys: Sequence[mx.array]) -> Iterator[None]:
    """Draws these keys again."""
    _replayed.append(iter(keys))
    try:
        yield
    finally:
        _replayed.pop()
