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

    Random numbers, of dropout, are the same both times. That reads the random state, so a function with
    dropout cannot be compiled.
    """
    if not any(module.training for module in modules):
        return function(*arrays)
    held = [tree_flatten(module.trainable_parameters()) for module in modules]
    tensors = [array for named in held for _, array in named]
    drawn: list[mx.array] = []  # random states before and after the forward pass

    def run(*given: mx.array) -> Any:
        with _replaced(modules, held, given[: len(tensors)]):
            return function(*given[len(tensors) :])

    @mx.custom_function
    def once(given: list[mx.array]) -> Any:
        drawn.append(_random_key())
        outputs = run(*given)
        drawn.append(_random_key())
        return outputs

    @once.vjp
    def again(given: list[mx.array], cotangents: Any, _: Any) -> list[mx.array]:
        wanted = list(cotangents) if isinstance(cotangents, (list, tuple)) else [cotangents]
        with _drawing_again(*drawn):
            _, gradients = mx.vjp(run, mx.depends(given, wanted), wanted)
        return gradients

    return once([*tensors, *arrays])  # type: ignore[operator]


@mx.custom_function
def together(*arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays as they are; in the backward pass none of their gradients is used before all are computed.

    For arrays that many layers share, as the reusing layers share keys and values. Their gradient is wanted only when
    the last of these layers has been passed, and a lazy graph puts off what is not wanted: each layer's scores and
    their gradients would be kept until then, far more than all else at 14 layers and 512 tokens (peak 161 MB, with
    this 49 MB; width 128, checkpointing).
    """
    return arrays


@together.vjp
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


@contextmanager
def _drawing_again(before: mx.array, after: mx.array) -> Iterator[None]:
    """Random numbers are those that came between two states, if any did; the state is as it was afterwards."""
    first, now = _number(before), _number(_random_key())
    if first == _number(after):
        yield
        return
    mx.random.seed(first)
    try:
        yield
    finally:
        mx.random.seed(now)


def _random_key() -> mx.array:
    """MLX's random state as it stands."""
    return mx.random.state[0]  # type: ignore


def _number(key: mx.array) -> int:
    """A random state as the seed that restores it."""
    high, low = key.tolist()  # type: ignore
    return int(high) << 32 | int(low)  # type: ignore
