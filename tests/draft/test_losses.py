"""Losses of draft models: against float64 loops, toolkit's against torch; gradients too, also of the head."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.data import Tokens, make_batch
from mlx_afm.draft.losses import (
    LOSSES,
    acceptance,
    chunked_pair_loss,
    draft_loss,
    rejection_of,
    same_share,
)
from mlx_afm.errors import ConfigError
from mlx_afm.training.distill import hidden_states_of, log_softmax
from tiny import tiny_model

TOKENS, WIDTH, WORDS, TEACHER = 7, 5, 11, 6


def distribution(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def loop_loss(name, q, p):
    """The loss of one token in Python floats."""
    alpha = sum(min(a, b) for a, b in zip(q, p))
    kl = sum(b * math.log(b / a) for a, b in zip(q, p))
    if name == "toolkit":
        return sum(a * math.log(a / b) for a, b in zip(q, p))
    if name == "forward-kl":
        return kl
    if name == "tv":
        return sum(abs(a - b) for a, b in zip(q, p)) / 2
    if name == "alpha":
        return -math.log(alpha)
    share = math.exp(-3 * alpha)
    return share * kl + (1 - share) * (1 - alpha)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "hidden": (TOKENS, WIDTH),
        "head": (WORDS, WIDTH),
        "teacher": (TOKENS, TEACHER),
        "head_t": (WORDS, TEACHER),
    }
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return {**found, "weights": rng.uniform(0, 2, TOKENS)}


def loop_total(name, arrays):
    total = 0.0
    for t in range(TOKENS):
        q = distribution((arrays["head"] @ arrays["hidden"][t]).tolist())
        p = distribution((arrays["head_t"] @ arrays["teacher"][t]).tolist())
        total += arrays["weights"][t] * loop_loss(name, q, p)
    return total


def ours(name, arrays, chunk_tokens=3):
    fixed = {key: mx.array(value.astype(np.float32)) for key, value in arrays.items()}

    def loss(hidden, head):
        return chunked_pair_loss(
            hidden,
            head,
            fixed["teacher"],
            lambda x: x @ fixed["head_t"].T,
            fixed["weights"],
            LOSSES[name],
            chunk_tokens=chunk_tokens,
        )

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(fixed["hidden"], fixed["head"])
    return value.item(), [np.array(gradient, np.float64) for gradient in gradients]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_values_are_those_of_a_loop(name, arrays, chunk_tokens):
    assert ours(name, arrays, chunk_tokens)[0] == pytest.approx(loop_total(name, arrays), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "hybrid"])
def test_gradients_are_those_of_differences_in_float64(name, arrays):
    step = 1e-6
    _, gradients = ours(name, arrays)
    for which, gradient in zip(("hidden", "head"), gradients):
        for place in np.ndindex(gradient.shape):
            moved = [{**arrays, which: arrays[which].copy()} for _ in range(2)]
            moved[0][which][place] += step
            moved[1][which][place] -= step
            expected = (loop_total(name, moved[0]) - loop_total(name, moved[1])) / (2 * step)
            assert gradient[place] == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_the_share_of_hybrid_has_no_gradient(arrays):
    """Its gradient is that of the two losses, weighted by the shares at this point."""
    fixed = {key: mx.array(value.astype(np.float32)) for key, value in arrays.items()}
    log_p = log_softmax(fixed["teacher"] @ fixed["head_t"].T)
    share = mx.exp(-3 * acceptance(log_softmax(fixed["hidden"] @ fixed["head"].T), log_p))

    def by_hand(hidden):
        log_q = log_softmax(hidden @ fixed["head"].T)
        both = share * LOSSES["forward-kl"](log_q, log_p) + (1 - share) * LOSSES["tv"](log_q, log_p)
        return mx.sum(both * fixed["weights"])

    expected = mx.grad(by_hand)(fixed["hidden"])
    np.testing.assert_allclose(ours("hybrid", arrays)[1][0], np.array(expected), rtol=1e-4, atol=1e-6)


def test_a_draft_that_is_its_target_is_accepted(arrays):
    same = {**arrays, "teacher": arrays["hidden"], "head_t": arrays["head"]}
    for name in LOSSES:
        assert ours(name, same)[0] == pytest.approx(0.0, abs=1e-5)


def test_no_chunk_is_refused(arrays):
    with pytest.raises(ConfigError, match="chunk_tokens below 1"):
        ours("tv", arrays, 0)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = rng.integers(1, 61, int(rng.integers(4, 12))).astype(np.int32)
        ids[:2] = 7, 8
        found.append(
            Tokens(ids, (np.arange(len(ids)) >= rng.integers(2, len(ids))).astype(np.float32), f"line {number}")
        )
    return found


@pytest.fixture(scope="module")
def pair():
    draft = tiny_model(
        3, num_layers=2, num_kv_reuse_layers=0, hidden_dim=16, num_heads=2, num_kv_heads=1, kv_quant=False
    )
    return draft, tiny_model(4)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_batch_is_the_sum_of_its_rows_and_the_score_is_what_is_refused(pair, count):
    draft, target = pair
    wanted = hidden_states_of(target)
    for loss_of in (draft_loss("forward-kl", wanted, target.logits), rejection_of(wanted, target.logits)):
        together = loss_of(draft, make_batch(rows(count))).item()
        assert together == pytest.approx(sum(loss_of(draft, make_batch([row])).item() for row in rows(count)), rel=1e-4)
    refused = rejection_of(hidden_states_of(target), target.logits)
    assert refused(target, make_batch(rows(3))).item() == pytest.approx(0.0, abs=1e-5)


def test_the_toolkit_takes_the_mean_of_each_example_first(pair):
    draft, target = pair
    loss_of = draft_loss("toolkit", hidden_states_of(target), target.logits)
    data = rows(5)
    means = [loss_of(draft, make_batch([row])).item() / row.weights[1:].sum() for row in data]
    batch = make_batch(same_share(data))
    assert loss_of(draft, batch).item() / batch.weights_BN.sum().item() == pytest.approx(np.mean(means), rel=1e-4)


@pytest.mark.parity
def test_toolkit_and_its_gradients_are_torchs(arrays):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    held = {key: torch.tensor(value, dtype=torch.float32) for key, value in arrays.items()}
    hidden, head = held["hidden"].requires_grad_(), held["head"].requires_grad_()
    student, teacher = hidden @ head.T, held["teacher"] @ held["head_t"].T
    soft = torch.softmax(student, -1)
    # As a difference of two cross-entropies with the student's probabilities as soft labels.
    cross = -(soft * torch.log_softmax(teacher, -1)).sum(-1)
    own = -(soft * torch.log_softmax(student, -1)).sum(-1)
    loss = ((cross - own) * held["weights"]).sum()
    loss.backward()
    value, gradients = ours("toolkit", arrays)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(gradients, (hidden.grad, head.grad)):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
