"""Acceptance: against simulation and by hand; what it predicts."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.data import Tokens
from mlx_afm.draft.acceptance import LENGTHS, break_even, measure_acceptance, summed_up
from mlx_afm.errors import DataError
from mlx_afm.training.distill import hidden_states_of
from tiny import tiny_model


def simulated(row, length, runs=20000, seed=0):
    """Tokens over passes of an answer whose proposals are accepted with these chances."""
    rng, passes = np.random.default_rng(seed), 0
    for _ in range(runs):
        place = 0
        while place < len(row):
            passes += 1
            taken = 0
            while taken < length and place + taken < len(row) and rng.random() < row[place + taken]:
                taken += 1
            place += taken + 1
    return len(row) * runs / passes


def test_tokens_a_pass_are_those_of_a_simulation():
    row = np.array([0.9, 0.2, 0.7, 0.7, 1.0, 0.0, 0.5, 0.8, 0.9])
    found = summed_up([row], [row])
    for length in (1, 2, 4, 8):
        assert found.tokens_per_pass[length - 1] == pytest.approx(simulated(row, length), rel=0.01)


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.8, 1.0])
def test_long_answers_of_one_chance_give_the_known_formula(chance):
    row = np.full(4000, chance)
    for length, tokens in zip(LENGTHS, summed_up([row], [row]).tokens_per_pass):
        assert tokens == pytest.approx(sum(chance**j for j in range(length + 1)), rel=0.01)


def test_figures_by_hand():
    found = summed_up([np.array([0.5, 1.0]), np.array([0.1])], [np.array([1.0, 0.0]), np.array([1.0])])
    assert (found.tokens, found.sampled, found.greedy) == (3, pytest.approx(1.6 / 3), pytest.approx(2 / 3))
    assert found.by_position == ((0, 2, pytest.approx(0.3), 1.0), (1, 1, 1.0, 0.0))
    # Greedy: the first answer's tokens are proposed as "right, wrong", and both fit into one pass of k >= 1.
    assert found.greedy_tokens_per_pass[0] == pytest.approx(3 / 2)


def test_speed_up_and_the_best_number_of_proposals():
    row = np.full(2000, 0.8)
    found = summed_up([row], [row])
    for cost in (0.02, 0.1, 0.3, 1.5):
        speed_ups = found.speed_ups(cost)
        by_hand = [sum(0.8**j for j in range(k + 1)) / (1 + k * cost) for k in LENGTHS]
        assert speed_ups == pytest.approx(by_hand, rel=0.01)
        best = found.best_length(cost)
        assert best == (0 if max(by_hand) <= 1 else LENGTHS[int(np.argmax(by_hand))])


@pytest.mark.parametrize(("length", "cost"), list(itertools.product((1, 3, 8), (0.01, 0.2, 0.9))))
def test_break_even(length, cost):
    chance = break_even(length, cost)
    assert sum(chance**j for j in range(length + 1)) == pytest.approx(1 + length * cost, rel=1e-6)
    assert break_even(length, 1.0) == float("inf")


def examples(count):
    rng = np.random.default_rng(1)
    found = []
    for number in range(count):
        ids = rng.integers(1, 61, int(rng.integers(5, 14))).astype(np.int32)
        found.append(Tokens(ids, (np.arange(len(ids)) >= 3).astype(np.float32), f"line {number}"))
    return found


def test_a_model_accepts_itself_and_a_stranger_less():
    target = tiny_model(0)
    stranger = tiny_model(9, num_layers=2, num_kv_reuse_layers=0, kv_quant=False)
    data, wanted = examples(11), hidden_states_of(target)
    itself = measure_acceptance(target, wanted, target.logits, data, batch_size=4)
    assert itself.sampled >= 0.999
    assert itself.greedy == 1.0
    assert itself.tokens_per_pass[-1] > 2
    other = measure_acceptance(stranger, wanted, target.logits, data, batch_size=4)
    chances = []
    for row in data:
        hidden = [model.hidden(mx.array(row.ids[None, :-1]))[0] for model in (stranger, target)]
        q, p = (np.array(mx.softmax(m.logits(h), axis=-1), np.float64) for m, h in zip((stranger, target), hidden))
        chances += np.minimum(q, p).sum(axis=-1)[np.flatnonzero(row.weights[1:])].tolist()
    assert other.sampled == pytest.approx(np.mean(chances), rel=1e-5)
    assert other.tokens == len(chances)
    assert measure_acceptance(stranger, wanted, target.logits, data, batch_size=1).sampled == pytest.approx(
        other.sampled
    )


def test_data_without_answers_is_refused():
    target = tiny_model(0)
    none = [Tokens(row.ids, np.zeros(len(row), np.float32), row.where) for row in examples(2)]
    with pytest.raises(DataError, match="no trained tokens"):
        measure_acceptance(target, hidden_states_of(target), target.logits, none)
