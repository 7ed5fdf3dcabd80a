"""Sums over one optimizer step: losses, gradients and token counts travel together, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer, clip_grad_norm
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_afm.data import Batch, Tokens, make_batch, plan_in_order
from mlx_afm.errors import ConfigError
from mlx_afm.model import Model
from mlx_afm.training.distributed import ALONE, Ranks, shard
from mlx_afm.training.loss import chunked_cross_entropy, cross_entropy, summed_loss

Loss = Callable[[Model, Batch, bool], mx.array]  # model, batch, grad_checkpoint -> sum of weighted losses, nats

BatchOf = Callable[[Sequence[Tokens]], Batch]
OnBatches = Callable[[int, int], None]  # batches done, batches in all


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        loss: sum over all targets, nats.
        tokens: sum of their weights.
        read_tokens: inputs that are not padding.
        gradient_norm: of the mean loss, before clipping.
        applied: False if the gradient was not finite and the step was left out.
    """

    loss: float
    tokens: float
    read_tokens: int
    gradient_norm: float
    applied: bool


def require_float32(model: Model) -> None:
    """Refuses to train 16-bit tensors: their updates are smaller than their rounding.

    Raises:
        ConfigError: trained tensors that are not float32, all named; or nothing to train.
    """
    trained = tree_flatten(model.trainable_parameters())
    if not trained:
        raise ConfigError("nothing to train", advice="Add an adapter, or unfreeze the model.")
    wrong = [f"{name}: {array.dtype}" for name, array in trained if array.dtype != mx.float32]
    if wrong:
        advice = "In 16 bits an update is smaller than the rounding of what it changes. The frozen base may be 16-bit."
        raise ConfigError("trained tensors must be float32", advice=advice, details=wrong)


def batch_loss(model: Model, batch: Batch, grad_checkpoint: bool = False) -> mx.array:
    """Sum of the weighted losses of a batch, with gradients.

    The head is trained only if it is not frozen; then its logits are held as a whole, since the
    chunked loss has no gradient for the head.
    """
    hidden_BND = model.hidden(
        batch.inputs_BL,
        packing=batch.packing,
        output_positions=batch.output_positions_BN,
        grad_checkpoint=grad_checkpoint,
        activations=batch.activations,
    )
    hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])
    targets_T, weights_T = batch.targets_BN.reshape(-1), batch.weights_BN.reshape(-1)
    if model.head.trainable_parameters():
        return cross_entropy(model.logits(hidden_TD), targets_T, weights_T)
    return chunked_cross_entropy(hidden_TD, model.logits, targets_T, weights_T)


def train_step(
    model: Model,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    *,
    clip_norm: float,
    grad_checkpoint: bool = False,
    ranks: Ranks = ALONE,
    loss_of: Loss = batch_loss,
    on_gradients: Callable[[Any], None] | None = None,
) -> StepResult:
    """One optimizer step over the sum of some micro-batches.

    Every target weighs the same, however the micro-batches cut the data. One micro-batch's
    activations are in memory at a time; with `grad_checkpoint` one array per layer of them. With several
    ranks each brings its own micro-batches, perhaps none, and all take the same step over all of them.
    `loss_of` is what is lowered, the next token's cross entropy unless another is given. `on_gradients` is told of
    the gradients, a tree of arrays, if they are finite.
    """
    loss_and_grad = nn.value_and_grad(model, loss_of)
    loss = tokens = mx.array(0.0)
    gradients: Any = None
    read_tokens = 0
    for batch in batches:
        part, part_gradients = loss_and_grad(model, batch, grad_checkpoint)
        loss, tokens = loss + part, tokens + batch.weights_BN.sum()
        gradients = part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)
        read_tokens += batch.read_tokens
        mx.eval(loss, tokens, gradients)
    if ranks.size > 1:
        loss, tokens, read_tokens, gradients = _over_ranks(ranks, model, loss, tokens, read_tokens, gradients)
    gradients = tree_map(lambda gradient: gradient / tokens, gradients)
    gradients, norm = clip_grad_norm(gradients, clip_norm or math.inf)
    total, gradient_norm = _number(loss), _number(norm)
    finite = math.isfinite(total) and math.isfinite(gradient_norm)
    if finite:
        if on_gradients is not None:
            on_gradients(gradients)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
    return StepResult(total, _number(tokens), read_tokens, gradient_norm, finite)


def _over_ranks(
    ranks: Ranks, model: Model, loss: mx.array, tokens: mx.array, read_tokens: int, gradients: Any
) -> tuple[mx.array, mx.array, int, Any]:
    """The sums over all ranks; one without micro-batches brings zeros."""
    if gradients is None:
        gradients = tree_map(mx.zeros_like, model.trainable_parameters())
    named = tree_flatten(gradients)
    summed = ranks.sum_arrays([gradient for _, gradient in named])
    total_loss, total_tokens, total_read = ranks.sum_numbers(_number(loss), _number(tokens), read_tokens)
    tree = tree_unflatten(list(zip((name for name, _ in named), summed)))
    return mx.array(total_loss), mx.array(total_tokens), round(total_read), tree


def _number(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def next_token_loss(model: Model, batch: Batch, grad_checkpoint: bool = False) -> mx.array:
    """Sum of the weighted losses of a batch, without gradients, evaluated chunk by chunk."""
    hidden_BND = model.hidden(
        batch.inputs_BL,
        packing=batch.packing,
        output_positions=batch.output_positions_BN,
        activations=batch.activations,
    )
    hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])
    return summed_loss(hidden_TD, model.logits, batch.targets_BN.reshape(-1), batch.weights_BN.reshape(-1))


def evaluate(model: Model, batches: Iterable[Batch], score_of: Loss = next_token_loss) -> tuple[float, float]:
    """Sum of losses in nats and of target weights over some batches, without dropout."""
    training = model.training
    model.eval()
    loss = tokens = 0.0
    for batch in batches:
        loss += _number(score_of(model, batch, False))
        tokens += _number(batch.weights_BN.sum())
    model.train(training)
    return loss, tokens


def evaluate_data(
    model: Model,
    data: Sequence[Tokens],
    batch_size: int,
    max_batches: int = -1,
    *,
    ranks: Ranks = ALONE,
    on_batches: OnBatches = lambda done, total: None,
    batch_of: BatchOf = make_batch,
    score_of: Loss = next_token_loss,
) -> tuple[float, float]:
    """Sum of losses (nats) and of target weights over examples, in their order; dealt to the ranks.

    `on_batches` is given the number of batches done and in all, of this rank, after each one.
    """
    plan = plan_in_order(len(data), batch_size)
    plan = shard(plan if max_batches < 0 else plan[:max_batches], ranks)
    loss, tokens = ranks.sum_numbers(*evaluate(model, _batches(data, plan, on_batches, batch_of), score_of))
    return loss, tokens


def _batches(data: Sequence[Tokens], plan: Sequence[Any], on_batches: OnBatches, batch_of: BatchOf) -> Iterator[Batch]:
    """The batches of a plan; each is done when the next one is asked for."""
    for done, indices in enumerate(plan, 1):
        yield batch_of([data[index] for index in indices])
        on_batches(done, len(plan))
