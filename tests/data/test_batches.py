"""Tokens to batches."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_afm.data import Tokens, padded_batch, plan_batches, plan_in_order
from mlx_afm.errors import ConfigError


def tokens_of(*weights: float) -> Tokens:
    return Tokens(np.arange(10, 10 + len(weights), dtype=np.int32), np.array(weights, np.float32), "x")


def test_a_batch_shifts_by_one_and_keeps_what_is_needed():
    batch = padded_batch([tokens_of(0, 0, 1, 1), tokens_of(0, 0.5, 0, 0, 0, 1), tokens_of(1, 0)])
    assert batch.inputs_BL.tolist() == [[10, 11, 12, 0, 0], [10, 11, 12, 13, 14], [10, 0, 0, 0, 0]]
    assert batch.output_positions_BN.tolist() == [[1, 2], [0, 4], [0, 0]]
    assert batch.targets_BN.tolist() == [[12, 13], [11, 15], [0, 0]]
    # The first token is nobody's target, whatever its weight.
    assert batch.weights_BN.tolist() == [[1, 1], [0.5, 1], [0, 0]]
    assert batch.read_tokens == 3 + 5 + 1


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_a_plan_holds_every_example_once_and_depends_on_seed_and_epoch(count):
    lengths = np.random.default_rng(1).integers(5, 400, count).tolist()
    plan = plan_batches(lengths, 4, seed=3, epoch=2)
    assert sorted(index for batch in plan for index in batch) == list(range(count))
    assert plan == plan_batches(lengths, 4, seed=3, epoch=2)
    assert sum(len(batch) < 4 for batch in plan) <= 1 + count // 128
    if count > 7:
        assert plan != plan_batches(lengths, 4, seed=3, epoch=3)
        assert plan != plan_batches(lengths, 4, seed=4, epoch=2)


def test_a_plan_wastes_little_on_padding():
    lengths = np.random.default_rng(1).integers(5, 400, 1000).tolist()

    def padded(plan):
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in plan)

    assert padded(plan_batches(lengths, 8, seed=0, epoch=0)) < 1.1 * sum(lengths)
    assert padded(plan_in_order(1000, 8)) > 1.5 * sum(lengths)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch size below 1"):
        plan_batches([1, 2], 0, seed=0, epoch=0)
