"""Cross entropy from hidden states, never holding all logits at once.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_afm.errors import ConfigError

CHUNK_TOKENS = 256  # at 153,600 words one chunk of float32 logits is 157 MB

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
    Cost: one chunk of logits and its gradient, about 3 * chunk_tokens * V * 4 bytes.
    Source: checked against `cross_entropy` and a float64 loop in tests.
    """
    if chunk_tokens < 1:
        raise ConfigError("chunk_tokens below 1", found=chunk_tokens)

    def chunk_loss(hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return cross_entropy(head(hidden), targets, weights)

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        total, gradients = mx.array(0.0), []
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part = hidden[rows]
            if gradients:
                part = mx.depends([part], [gradients[-1], total])[0]
            loss, gradient = mx.value_and_grad(chunk_loss)(part, targets[rows], weights[rows])
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

    total, _ = loss_and_gradient(hidden_TD, targets_T, weights_T)
    return total


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
