"""The order of the data: plans of epochs, and how many steps they make."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens
from mlx_afm.errors import ConfigError, DataError
from mlx_afm.training import DataOrder, TrainConfig, train
from tiny import tiny_model


def examples(count: int) -> list[Tokens]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(1, count + 1):
        ids = np.concatenate([np.arange(1, 9), rng.integers(1, 61, rng.integers(4, 30))]).astype(np.int32)
        found.append(Tokens(ids, (np.arange(len(ids)) >= len(ids) - 3).astype(np.float32), f"line {number}"))
    return found


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_tokens": 100}], ids=["size", "tokens"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_the_plans(settings, accumulation):
    config = TrainConfig(epochs=3, grad_accumulation_steps=accumulation, **settings)
    order, data = DataOrder(examples(50), config), examples(50)
    expected = sum(-(-len(order.epoch(number)) // accumulation) for number in range(3))
    assert order.total_steps == expected
    assert DataOrder(data, TrainConfig(iters=7, **settings)).total_steps == 7
    for number in range(3):
        assert sorted(index for batch in order.epoch(number) for index in batch) == list(range(50))
    assert order.epoch(0) != order.epoch(1)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_training_by_tokens(grad_checkpoint):
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=4))
    config = TrainConfig(epochs=2, batch_tokens=100, learning_rate=0.02, grad_checkpoint=grad_checkpoint)
    state = train(model, examples(30), [], config)
    assert (state.epoch, state.cursor) == (2, 0)
    assert state.trained_tokens == 2 * 30 * 3


def test_long_examples_are_refused_before_training_with_their_lines():
    with pytest.raises(DataError, match=r"longer than a row of 20 tokens(.|\n)*line \d+: 2\d tokens"):
        DataOrder(examples(10), TrainConfig(batch_tokens=20))
    with pytest.raises(ConfigError, match="batch_tokens: expected at least 1"):
        TrainConfig(batch_tokens=0)
