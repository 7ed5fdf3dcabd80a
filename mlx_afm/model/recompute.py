"""Trading time for memory: values that are computed again in the backward pass instead of kept.

What is recomputed costs only what its gradient needs, since a lazy graph drops the rest: the products with
frozen weights, nearly all of a layer's time, are not among it as long as their outputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def recomputed(modules: Sequence[nn.Module], function: Callable[..., Any], *arrays: mx.array) -> Any:
    """`function(*arrays)`, of which only inputs and outputs are kept for the backward pass.

    Args:
        modules: every module with trained tensors that `function` uses. `mx.checkpoint` differentiates
            what it is given as an argument and nothing else, so their tensors are passed along.
        function: what it closes over gets no gradient; in a loop, bind loop variables.
        arrays: float arrays.

    Random numbers, of dropout, are the same both times. That reads the random state, so a function with
    dropout cannot be compiled.
    """
    if not any(module.training for module in modules):
        return function(*arrays)
    drawn: list[mx.array] = []  # random states before and after the forward pass

    def run(parameters: list[Any], *arrays: mx.array) -> Any:
        if not drawn:
            drawn.append(_random_key())
            outputs = _with_parameters(modules, parameters, function, arrays)
            drawn.append(_random_key())
            return outputs
        first, last = _number(drawn[0]), _number(drawn[1])
        if first == last:
            return _with_parameters(modules, parameters, function, arrays)
        now = _number(_random_key())
        mx.random.seed(first)
        outputs = _with_parameters(modules, parameters, function, arrays)
        mx.random.seed(now)
        return outputs

    return mx.checkpoint(run)([module.trainable_parameters() for module in modules], *arrays)


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


def _with_parameters(
    modules: Sequence[nn.Module], parameters: list[Any], function: Callable[..., Any], arrays: Sequence[mx.array]
) -> Any:
    """The function's value with other tensors in the modules, which get theirs back afterwards."""
    held = [module.trainable_parameters() for module in modules]
    for module, tensors in zip(modules, parameters):
        module.update(tensors)
    try:
        return function(*arrays)
    finally:
        for module, tensors in zip(modules, held):
            module.update(tensors)


def _random_key() -> mx.array:
    """MLX's random state as it stands."""
    return mx.random.state[0]  # type: ignore


def _number(key: mx.array) -> int:
    """A random state as the seed that restores it."""
    high, low = key.tolist()  # type: ignore
    return int(high) << 32 | int(low)  # type: ignore
