"""Distillation: equal to a float64 loop, its gradient to the plain one's, and no gradient for the teacher."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm.data import Tokens, make_batch
from mlx_afm.errors import ConfigError
from mlx_afm.training import TrainConfig, train
from mlx_afm.training.distill import chunked_divergence, distillation_from, divergence
from mlx_afm.training.step import train_step
from tiny import tiny_model, with_adapter

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 23, 8, 6, 37


def problem():
    rng = np.random.default_rng(0)
    hidden, table = (mx.array(rng.standard_normal((n, WIDTH)), mx.float32) for n in (TOKENS, VOCABULARY))
    wanted, words = (mx.array(rng.standard_normal((n, TEACHER_WIDTH)), mx.float32) for n in (TOKENS, VOCABULARY))
    return hidden, table, wanted, words, mx.array(rng.choice([0.0, 1.0, 0.5], TOKENS), mx.float32)


def log_probabilities(row, table):
    scores = np.array(table, np.float64) @ row
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


def loop(hidden, table, wanted, words, weights):
    total = 0.0
    for student, teacher, weight in zip(np.array(hidden, np.float64), np.array(wanted, np.float64), weights.tolist()):
        p, q = log_probabilities(teacher, words), log_probabilities(student, table)
        total += weight * np.sum(np.exp(p) * (p - q))
    return total


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
def test_value_and_gradient(chunk_tokens):
    hidden, table, wanted, words, weights = problem()

    def chunked(hidden, wanted):
        heads = (lambda h: h @ table.T), (lambda h: h @ words.T)
        return 3 * chunked_divergence(hidden, heads[0], wanted, heads[1], weights, chunk_tokens=chunk_tokens)

    def plain(hidden):
        return 3 * divergence(hidden @ table.T, wanted @ words.T, weights)

    loss, (gradient, for_teacher) = mx.value_and_grad(chunked, argnums=(0, 1))(hidden, wanted)
    expected, expected_gradient = mx.value_and_grad(plain)(hidden)
    assert loss.item() == pytest.approx(3 * loop(hidden, table, wanted, words, weights), rel=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.abs(expected_gradient).max().item() > 0.1
    assert mx.abs(gradient - expected_gradient).max().item() < 1e-5
    assert not mx.any(for_teacher).item()


def test_a_model_diverges_from_itself_by_nothing():
    hidden, table, _, _, weights = problem()

    def loss(hidden):
        return chunked_divergence(hidden, lambda h: h @ table.T, problem()[0], lambda h: h @ table.T, weights)

    value, gradient = mx.value_and_grad(loss)(hidden)
    assert abs(value.item()) < 1e-5
    assert mx.abs(gradient).max().item() < 1e-6


def test_chunks_below_one_are_refused():
    hidden, table, wanted, words, weights = problem()
    with pytest.raises(ConfigError, match="chunk_tokens below 1"):
        chunked_divergence(hidden, lambda h: h @ table.T, wanted, lambda h: h @ words.T, weights, chunk_tokens=0)


def examples(count=8):
    rng = np.random.default_rng(1)
    made = []
    for length in rng.integers(6, 14, count):
        weights = (np.arange(length) > length // 2).astype(np.float32)
        made.append(Tokens(rng.integers(1, 61, length).astype(np.int32), weights, "test"))
    return made


def test_of_two_models_it_is_the_divergence_of_their_outputs_at_trained_positions():
    student, teacher, batch = with_adapter(tiny_model(0)), tiny_model(1), make_batch(examples())
    found = distillation_from(teacher)(student, batch, False).item()
    positions = batch.output_positions_BN
    hidden = [
        model.hidden(batch.inputs_BL, packing=batch.packing, output_positions=positions) for model in (student, teacher)
    ]
    logits = [model.logits(state) for model, state in zip((student, teacher), hidden, strict=True)]
    flat = [array.reshape(-1, array.shape[-1]) for array in logits]
    assert found == pytest.approx(divergence(*flat, batch.weights_BN.reshape(-1)).item(), rel=1e-5)
    assert found > 1


def test_a_run_brings_the_student_to_the_teacher_and_leaves_the_teacher_alone():
    student, teacher, data = with_adapter(tiny_model(0)), tiny_model(0), examples()
    before = {name: np.array(array) for name, array in tree_flatten(teacher.parameters())}
    loss = distillation_from(teacher)
    start = loss(student, make_batch(data), False).item()
    config = TrainConfig(iters=30, batch_size=8, learning_rate=2e-2, steps_per_eval=100, save_every=100)
    train(student, data, [], config, loss_of=loss)
    student.eval()
    assert loss(student, make_batch(data), False).item() < 0.2 * start
    assert not teacher.trainable_parameters().get("model", {}).get("embedding")
    for name, array in tree_flatten(teacher.parameters()):
        assert np.array_equal(np.array(array), before[name]), name


def test_a_head_that_is_trained_gets_its_gradient():
    model, teacher, batch = tiny_model(0), tiny_model(1), make_batch(examples())
    before, loss = np.array(model.model.embedding.weight), distillation_from(teacher)
    import mlx.optimizers as optim

    result = train_step(model, optim.SGD(learning_rate=0.1), [batch], clip_norm=1.0, loss_of=loss)
    assert result.applied
    moved = np.abs(np.array(model.model.embedding.weight) - before).max(axis=1)
    read = set(np.array(batch.inputs_BL).reshape(-1).tolist())
    assert all(moved[word] > 0 for word in range(61) if word not in read)  # a word never read moves as an output only
