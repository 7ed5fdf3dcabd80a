"""Distillation: a model learns another one's distributions, which are never held all at once.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_afm.data import Batch
from mlx_afm.errors import ConfigError
from mlx_afm.model import Model
from mlx_afm.training.frozen import FrozenLayers
from mlx_afm.training.loss import CHUNK_TOKENS, Head
from mlx_afm.training.step import Loss


def divergence(student_TV: mx.array, teacher_TV: mx.array, weights_T: mx.array) -> mx.array:
    """Weighted sum of KL(teacher || student) over tokens, in nats, computed in float32 from logits."""
    student, teacher = log_softmax(student_TV), log_softmax(teacher_TV)
    return mx.sum(mx.sum(mx.exp(teacher) * (teacher - student), axis=-1) * weights_T)


def log_softmax(logits_TV: mx.array) -> mx.array:
    """Log probabilities in float32."""
    wide = logits_TV.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


def chunked_divergence(
    hidden_TD: mx.array,
    head: Head,
    teacher_TD: mx.array,
    teacher_head: Head,
    weights_T: mx.array,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> mx.array:
    """The same sum from hidden states; its gradient is computed in the forward pass, chunk by chunk.

    Args:
        hidden_TD: float (T, D), the student's.
        head: hidden states (t, D) to logits (t, V); its own weights get no gradient.
        teacher_TD, teacher_head: the teacher's, which get none either; its width may be another.
        weights_T: float32 (T,).
        chunk_tokens: rows of logits held at once, of each of the two.

    Returns: float32 scalar, nats.
    Raises: ConfigError if chunk_tokens < 1.
    Cost: some six arrays of chunk_tokens * V * 4 bytes at a time, however many tokens there are; as with
        `chunked_cross_entropy` each chunk waits for the one before it.
    Source: checked against `divergence` and a float64 loop in tests.
    """
    if chunk_tokens < 1:
        raise ConfigError("chunk_tokens below 1", found=chunk_tokens)

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array, teacher: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0)
        gradients: list[mx.array] = []
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, target = hidden[rows], teacher[rows]
            if gradients:
                part, target = mx.depends([part, target], [gradients[-1], total])
            loss, gradient = _chunk(part, head, teacher_head(target), weights[rows])
            total = total + loss
            gradients.append(gradient)
        return total, mx.concatenate(gradients)

    @loss_and_gradient.vjp
    def _(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, teacher, weights = primals
        gradient = cotangents[0].astype(outputs[1].dtype) * outputs[1]
        return gradient, mx.zeros_like(teacher), mx.zeros_like(weights)

    outputs: tuple[mx.array, mx.array] = loss_and_gradient(hidden_TD, teacher_TD, weights_T)  # type: ignore
    return outputs[0]


def _chunk(hidden_TD: mx.array, head: Head, teacher_TV: mx.array, weights_T: mx.array) -> tuple[mx.array, mx.array]:
    """Divergence of a chunk and its gradient, (student - teacher) * weight sent back through the head."""
    logits = head(hidden_TD)
    student, teacher = log_softmax(logits), log_softmax(teacher_TV)
    wanted = mx.exp(teacher)
    loss = mx.sum(mx.sum(wanted * (teacher - student), axis=-1) * weights_T)
    errors = (mx.exp(student) - wanted) * weights_T[:, None]
    _, gradients = mx.vjp(head, [hidden_TD], [errors.astype(logits.dtype)])
    return loss, gradients[0]


def hidden_states_of(teacher: Model, layers: FrozenLayers | None = None) -> Callable[[Batch], mx.array]:
    """Gives the final hidden states (B, N, D) of a model at the trained positions of a batch.

    Args:
        teacher: read only; see `distillation_from`.
        layers: all layers of the teacher, whose activations come from there.
    """
    teacher.freeze()
    teacher.eval()

    def hidden(batch: Batch) -> mx.array:
        activations = None if layers is None else layers.activations_of(batch)
        return teacher.hidden(
            batch.inputs_BL,
            packing=batch.packing,
            output_positions=batch.output_positions_BN,
            activations=activations,
        )

    return hidden


def distillation_from(teacher: Model, layers: FrozenLayers | None = None) -> Loss:
    """A loss for `train`: KL(teacher || model) at the trained positions.

    Args:
        teacher: read only; its weights are frozen here and it draws no random numbers. It needs the model's
            tokens, so also its vocabulary. With `layers` only its final norm and its head are used.
        layers: all layers of the teacher, whose activations come from there.

    Cost: a forward pass of the teacher, whose hidden states at trained positions alone are kept.
    """
    wanted = hidden_states_of(teacher, layers)

    def loss_of(model: Model, batch: Batch, grad_checkpoint: bool = False) -> mx.array:
        wanted_BND = wanted(batch)
        mx.eval(wanted_BND)  # before the student's pass, so that the two never stand in memory together
        hidden_BND = model.hidden(
            batch.inputs_BL,
            packing=batch.packing,
            output_positions=batch.output_positions_BN,
            grad_checkpoint=grad_checkpoint,
            activations=batch.activations,
        )
        hidden_TD, wanted_TD = (array.reshape(-1, array.shape[-1]) for array in (hidden_BND, wanted_BND))
        weights_T = batch.weights_BN.reshape(-1)
        if model.head.trainable_parameters():  # the chunked loss has no gradient for the head
            return divergence(model.logits(hidden_TD), teacher.logits(wanted_TD), weights_T)
        return chunked_divergence(hidden_TD, model.logits, wanted_TD, teacher.logits, weights_T)

    return loss_of
