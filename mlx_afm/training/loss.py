"""Cross entropy from hidden states, never holding all logits at once.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_afm.errors import ConfigError
from mlx_afm.model.backend import exp

CHUNK_TOKENS = 128  # at 153,600 words one chunk of float32 logits is 79 MB; see Cost below

Head = Callable[[mx.array], mx.array]


def cross_entropy(logits_TV: mx.array, targets_T: mx.array, weights_T: mx.array) -> mx.array:
    """Weighted sum of -log softmax(logits)[target], in nats, computed in float32."""
    logits = logits_TV.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets_T[:, None], axis=-1)[:, 0]
    return mx.sum((mx.logsumexp(logits, axis=-1) - picked) * weights_T)


def chunked_cross_entropy(
    hidden_TD: mx.array, head: Head, targets_T: mx.array, weights_T: mx.array, *, chunk_tokens: int = CHUNK_TOKENS
) -> mx.array:
    """Sum of weighted token losses; its gradient is computed in the forward pass, chunk by chunk.

    Each chunk waits for the gradient of the one before it (`mx.depends`). Without that forced order
    a lazy graph is free to hold the logits of every chunk at the same time.

    Args:
        hidden_TD: float (T, D).
        head: hidden states (t, D) to logits (t, V); its own weights get no gradient.
        targets_T: int32 (T,).
        weights_T: float32 (T,).
        chunk_tokens: rows of logits held at once.

    Returns: float32 scalar, nats.
    Raises: ConfigError if chunk_tokens < 1.
    Cost: 3 * chunk_tokens * V * 4 bytes at a time; MLX's CPU backend keeps ten operations in flight,
        so about 10 * chunk_tokens * V * 4 bytes there, however many tokens there are.
    Source: checked against `cross_entropy` and a float64 loop in tests.
    """
    if chunk_tokens < 1:
        raise ConfigError("chunk_tokens below 1", found=chunk_tokens)

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0)
        gradients: list[mx.array] = []
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part = hidden[rows]
            if gradients:
                part = mx.depends([part], [gradients[-1], total])[0]
            loss, gradient = _chunk_loss_and_gradient(part, head, targets[rows], weights[rows])
            total = total + loss
            gradients.append(gradient)
        return total, mx.concatenate(gradients)

    @loss_and_gradient.vjp
    def _(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, targets, weights = primals
        gradient = cotangents[0].astype(outputs[1].dtype) * outputs[1]
        return gradient, mx.zeros_like(targets), mx.zeros_like(weights)

    outputs: tuple[mx.array, mx.array] = loss_and_gradient(hidden_TD, targets_T, weights_T)  # type: ignore
    return outputs[0]


def _chunk_loss_and_gradient(
    hidden_TD: mx.array, head: Head, targets_T: mx.array, weights_T: mx.array
) -> tuple[mx.array, mx.array]:
    """Loss of a chunk and its gradient (softmax - one-hot) * weight, sent back through the head.

    Written out because differentiating `cross_entropy` holds about three times as many copies, and takes
    every exponential twice.
    """
    logits = head(hidden_TD)
    wide = logits.astype(mx.float32)
    columns, weights = targets_T[:, None], weights_T[:, None]
    highest = mx.max(wide, axis=-1, keepdims=True)
    powers = exp(wide - highest)
    sums = mx.sum(powers, axis=-1, keepdims=True)
    loss = mx.sum((mx.log(sums) + highest - mx.take_along_axis(wide, columns, axis=-1)) * weights)
    words_1V = mx.arange(wide.shape[-1])[None]
    errors = _errors(powers, weights / sums, words_1V, columns, weights)
    _, gradients = mx.vjp(head, [hidden_TD], [errors.astype(logits.dtype)])
    return loss, gradients[0]


@partial(mx.compile, shapeless=True)  # one pass over the logits
def _errors(
    powers_TV: mx.array, factors_T1: mx.array, words_1V: mx.array, targets_T1: mx.array, weights_T1: mx.array
) -> mx.array:
    """Probability of each word, less one for the target; times the weight."""
    return powers_TV * factors_T1 - mx.where(words_1V == targets_T1, weights_T1, 0.0)


def summed_loss(
    hidden_TD: mx.array, head: Head, targets_T: mx.array, weights_T: mx.array, *, chunk_tokens: int = CHUNK_TOKENS
) -> mx.array:
    """The same sum without a gradient, evaluated chunk by chunk; for validation."""
    total = mx.array(0.0)
    for start in range(0, hidden_TD.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        total = total + cross_entropy(head(hidden_TD[rows]), targets_T[rows], weights_T[rows])
        mx.eval(total)
    return total
