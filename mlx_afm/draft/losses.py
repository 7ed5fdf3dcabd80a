"""What a draft model is trained to lower, from its own and the target's hidden states.

p are the target's probabilities at a position, q the draft's, alpha = sum min(p, q) the chance that a proposed token is
accepted.

    toolkit      sum q log(q / p), reverse KL, each example's mean weighing the same; as Apple's toolkit trains
    forward-kl   sum p log(p / q)
    tv           1 - alpha, the total variation distance
    alpha        -log alpha
    hybrid       lambda KL(p || q) + (1 - lambda) TV with lambda = exp(-3 alpha), itself without a gradient

All are in nats but tv, computed in float32.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_afm.data import Batch, Tokens
from mlx_afm.errors import ConfigError
from mlx_afm.model import Model
from mlx_afm.training.distill import log_softmax
from mlx_afm.training.loss import CHUNK_TOKENS, Head
from mlx_afm.training.step import Loss

TokenLoss = Callable[[mx.array, mx.array], mx.array]  # log q and log p, (T, V) each, to the loss of each token (T,)
HYBRID_RATE = 3.0  # of lambda = exp(-3 alpha); arXiv 2602.23881
SMALLEST = 1e-30  # of alpha in a logarithm


def acceptance(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """Chance (T,) that a token drawn from q is accepted against p, at temperature 1."""
    return mx.sum(mx.minimum(mx.exp(log_q_TV), mx.exp(log_p_TV)), axis=-1)


def reverse_kl(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """KL(q || p) of each token."""
    return mx.sum(mx.exp(log_q_TV) * (log_q_TV - log_p_TV), axis=-1)


def forward_kl(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """KL(p || q) of each token."""
    return mx.sum(mx.exp(log_p_TV) * (log_p_TV - log_q_TV), axis=-1)


def total_variation(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """Half the sum of |p - q| of each token, which is 1 - alpha."""
    return 0.5 * mx.sum(mx.abs(mx.exp(log_q_TV) - mx.exp(log_p_TV)), axis=-1)


def negative_log_acceptance(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """-log alpha of each token."""
    return -mx.log(mx.maximum(acceptance(log_q_TV, log_p_TV), SMALLEST))


def hybrid(log_q_TV: mx.array, log_p_TV: mx.array) -> mx.array:
    """KL where little is accepted, total variation where much is."""
    share = mx.stop_gradient(mx.exp(-HYBRID_RATE * acceptance(log_q_TV, log_p_TV)))
    return share * forward_kl(log_q_TV, log_p_TV) + (1 - share) * total_variation(log_q_TV, log_p_TV)


LOSSES: dict[str, TokenLoss] = {
    "toolkit": reverse_kl,
    "forward-kl": forward_kl,
    "tv": total_variation,
    "alpha": negative_log_acceptance,
    "hybrid": hybrid,
}
MEAN_OF_EXAMPLES = {"toolkit"}  # of each example, then over examples; the others over all tokens


def chunked_pair_loss(
    hidden_TD: mx.array,
    head_VD: mx.array,
    teacher_TD: mx.array,
    teacher_head: Head,
    weights_T: mx.array,
    token_loss: TokenLoss,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> mx.array:
    """Weighted sum of the losses of tokens; gradients of hidden states and head are made in the forward pass.

    Args:
        hidden_TD: float (T, D), the draft's.
        head_VD: its output matrix, which is trained too.
        teacher_TD: the target's hidden states, (T, of any width).
        teacher_head: these to logits (t, V); no gradient.
        weights_T: float32 (T,).
        token_loss: one of `LOSSES`.
        chunk_tokens: rows of logits held at once, of each of the two.

    Returns: float32 scalar.
    Raises: ConfigError if chunk_tokens < 1.
    Cost: about ten arrays of chunk_tokens * V * 4 bytes, and one of the head's size, however many tokens there are;
        each chunk waits for the one before it.
    Source: checked against float64 loops, and `toolkit` against torch, in tests.
    """
    if chunk_tokens < 1:
        raise ConfigError("chunk_tokens below 1", found=chunk_tokens)

    def chunk_loss(hidden: mx.array, head: mx.array, teacher: mx.array, weights: mx.array) -> mx.array:
        log_p = log_softmax(mx.stop_gradient(teacher_head(teacher)))
        return mx.sum(token_loss(log_softmax(hidden @ head.T), log_p) * weights)

    loss_and_gradients = mx.value_and_grad(chunk_loss, argnums=(0, 1))

    @mx.custom_function
    def whole(hidden: mx.array, head: mx.array, teacher: mx.array, weights: mx.array) -> tuple[mx.array, ...]:
        total, of_head, of_hidden = mx.array(0.0), mx.zeros(head.shape, mx.float32), list[mx.array]()
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, wanted = hidden[rows], teacher[rows]
            if of_hidden:
                part, wanted = mx.depends([part, wanted], [of_hidden[-1], of_head, total])
            loss, (first, second) = loss_and_gradients(part, head, wanted, weights[rows])
            total, of_head = total + loss, of_head + second
            of_hidden.append(first)
        return total, mx.concatenate(of_hidden), of_head.astype(head.dtype)

    @whole.vjp
    def _(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        _, _, teacher, weights = primals
        scale = cotangents[0]
        of_hidden, of_head = (scale.astype(array.dtype) * array for array in outputs[1:])
        return of_hidden, of_head, mx.zeros_like(teacher), mx.zeros_like(weights)

    outputs: tuple[mx.array, ...] = whole(hidden_TD, head_VD, teacher_TD, weights_T)  # type: ignore
    return outputs[0]


def draft_loss(name: str, wanted_of: Callable[[Batch], mx.array], teacher_head: Head) -> Loss:
    """A loss for `train`.

    Args:
        name: one of `LOSSES`.
        wanted_of: the target's final hidden states (B, N, D) at the trained positions of a batch.
        teacher_head: these to logits.
    """
    token_loss = LOSSES[name]

    def loss_of(model: Model, batch: Batch, grad_checkpoint: bool = False) -> mx.array:
        wanted_BND = wanted_of(batch)
        mx.eval(wanted_BND)  # before the draft's pass, so that the two never stand in memory together
        hidden_BND = model.hidden(
            batch.inputs_BL,
            packing=batch.packing,
            output_positions=batch.output_positions_BN,
            grad_checkpoint=grad_checkpoint,
        )
        hidden_TD, wanted_TD = (array.reshape(-1, array.shape[-1]) for array in (hidden_BND, wanted_BND))
        weights_T = batch.weights_BN.reshape(-1)
        return chunked_pair_loss(hidden_TD, model.head.weight, wanted_TD, teacher_head, weights_T, token_loss)

    return loss_of


def rejection_of(wanted_of: Callable[[Batch], mx.array], teacher_head: Head) -> Loss:
    """What evaluations tell: the weighted sum of 1 - alpha, without a gradient."""

    def loss_of(model: Model, batch: Batch, grad_checkpoint: bool = False) -> mx.array:
        weights_T, total = batch.weights_BN.reshape(-1), mx.array(0.0)
        for rows, log_q, log_p in iter_log_probabilities(model, batch, wanted_of(batch), teacher_head):
            total = total + mx.sum((1 - acceptance(log_q, log_p)) * weights_T[rows])
            mx.eval(total)
        return total

    return loss_of


def iter_log_probabilities(
    draft: Model, batch: Batch, wanted_BND: mx.array, teacher_head: Head
) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """Log q and log p at the output positions of a batch, a chunk of tokens at a time; without a gradient.

    Yields: which tokens (a slice of B * N), log q (t, V), log p (t, V).
    """
    hidden_BND = draft.hidden(batch.inputs_BL, packing=batch.packing, output_positions=batch.output_positions_BN)
    hidden_TD, wanted_TD = (array.reshape(-1, array.shape[-1]) for array in (hidden_BND, wanted_BND))
    for start in range(0, hidden_TD.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        yield rows, log_softmax(draft.logits(hidden_TD[rows])), log_softmax(teacher_head(wanted_TD[rows]))


def same_share(rows: Sequence[Tokens]) -> list[Tokens]:
    """The examples with weights whose sum is 1 each, so that each example's mean weighs the same."""
    sums = [float(np.sum(row.weights[1:])) for row in rows]
    return [replace(row, weights=row.weights / (total or 1.0)) for row, total in zip(rows, sums)]
