"""Activations of frozen layers: the loss and the gradients are those of the whole model, whatever the batch."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig, add_adapter
from mlx_afm.data import Tokens, make_batch
from mlx_afm.training.frozen import FrozenLayers, first_trained_layer
from mlx_afm.training.step import batch_loss, evaluate_data
from tiny import tiny_model, with_adapter

SYSTEM_END = 7
SIZES = {"num_layers": 7, "num_kv_reuse_layers": 3}  # layers 0-3 are ordinary, 4-6 reuse


class Shelf(dict):
    """A store in memory, with copies as a disk would give them."""

    def get(self, key):
        return None if key not in self else [array.copy() for array in self[key]]

    def put(self, key, arrays):
        self[key] = [array.copy() for array in arrays]


def examples(count, seed=0, system=True):
    """Conversations that begin alike, some of them with a question in common."""
    rng = np.random.default_rng(seed)
    start = [1, 5, 6, 9, SYSTEM_END] if system else []
    found = []
    for number in range(count):
        question = rng.integers(8, 60, int(rng.integers(3, 9))).tolist() if number % 3 else [11, 12, 13, 14]
        answer = rng.integers(8, 60, int(rng.integers(1, 6))).tolist()
        weights = [0.0] * len(start + question) + [1.0] * len(answer)
        found.append(
            Tokens(np.array(start + question + answer, np.int32), np.array(weights, np.float32), f"line {number}")
        )
    return found


def trained(layers, kind="lora", seed=0, **sizes):
    model = tiny_model(seed, **{**SIZES, **sizes})
    config = LoRAConfig(layers=layers) if kind == "full" else LoRAConfig(rank=4, layers=layers, fine_tune_type=kind)
    if kind == "full":
        config = LoRAConfig(layers=layers, fine_tune_type="full")
    add_adapter(model, config, seed=1)
    mx.eval(model.parameters())
    model.train()
    return model


def loss_and_gradients(model, batch):
    loss, gradients = nn.value_and_grad(model, batch_loss)(model, batch)
    return loss.item(), dict(tree_flatten(gradients))


def frozen_of(model, store=None, seed=0, prefix=SYSTEM_END, **sizes):
    def load():
        below = tiny_model(seed, **{**SIZES, **sizes})
        below.train()
        return below

    return FrozenLayers(model.args, first_trained_layer(model), load, store, prefix_end_id=prefix)


CASES = [("last-1", 6), ("last-2", 5), ("reuse", 4), ("last-4", 3), ("last-5", 2), ("1-6", 1)]


@pytest.mark.parametrize(("layers", "first"), CASES)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_loss_and_gradients_are_those_of_the_whole_model(layers, first, kind):
    model = trained(layers, kind)
    assert first_trained_layer(model) == first
    frozen = frozen_of(model, Shelf())
    for count, seed in ((1, 0), (2, 1), (6, 2), (9, 3)):
        rows = examples(count, seed)
        expected, gradients = loss_and_gradients(model, make_batch(rows))
        for _ in range(2):  # computed, then from the store
            found, others = loss_and_gradients(model, frozen.make_batch(rows))
            assert found == pytest.approx(expected, rel=1e-5)
            assert others.keys() == gradients.keys()
            for name, gradient in gradients.items():
                np.testing.assert_allclose(
                    np.array(others[name]), np.array(gradient), rtol=1e-3, atol=2e-5, err_msg=name
                )


def test_rows_packed_and_padded_are_both_tried():
    assert {make_batch(examples(count, seed)).packing is None for count, seed in ((2, 1), (6, 2), (9, 3))} == {
        True,
        False,
    }


@pytest.mark.parametrize("layers", ["last-2", "last-5"])
def test_the_store_gives_the_same_bits(layers):
    model = trained(layers)
    kept, again = frozen_of(model, Shelf()), frozen_of(model)
    rows = examples(9, 3)
    first = loss_and_gradients(model, kept.make_batch(rows))
    for source in (kept, again, frozen_of(model, kept.store)):
        loss, gradients = loss_and_gradients(model, source.make_batch(rows))
        assert loss == first[0]
        assert all(np.array_equal(np.array(gradients[name]), np.array(first[1][name])) for name in gradients)
    assert (kept.computed, kept.found, again.computed, again.found) == (9, 9, 9, 0)


def test_what_is_kept_depends_on_the_example_alone():
    model = trained("last-2")
    alone, among = frozen_of(model, Shelf()), frozen_of(model, Shelf())
    rows = examples(9, 3)
    alone.make_batch(rows[4:5])
    among.make_batch(rows[::-1])
    ((key, arrays),) = alone.store.items()
    assert all(np.array_equal(one, other) for one, other in zip(arrays, among.store[key]))


def test_without_a_common_beginning_and_without_quantized_keys():
    for sizes, prefix in (({}, None), ({"kv_quant": False}, SYSTEM_END)):
        model = trained("last-2", **sizes)
        rows = examples(6, 2)
        expected, _ = loss_and_gradients(model, make_batch(rows))
        found, _ = loss_and_gradients(model, frozen_of(model, Shelf(), prefix=prefix, **sizes).make_batch(rows))
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_key_holds_what_is_trained_only_where_only_that_is_kept():
    (row,) = examples(1)
    other = Tokens(row.ids, np.where(np.arange(len(row)) == len(row) - 1, 1.0, 0.0).astype(np.float32), row.where)
    reuse, full = frozen_of(trained("last-2")), frozen_of(trained("last-5"))
    heavier = Tokens(row.ids, 2 * row.weights, row.where)
    assert reuse.key(row) == reuse.key(heavier) != reuse.key(other)
    assert full.key(row) == full.key(other)


def test_a_validation_loss_is_the_same():
    model, data = trained("last-2"), examples(10, 5)
    frozen = frozen_of(model, Shelf())
    for _ in range(2):
        loss, tokens = evaluate_data(model, data, 4, batch_of=frozen.make_batch)
        assert (loss, tokens) == pytest.approx(evaluate_data(model, data, 4), rel=1e-5)


def test_sixteen_bits_come_back_as_they_were():
    model = trained("last-2")
    model.set_dtype(mx.bfloat16, predicate=lambda dtype: mx.issubdtype(dtype, mx.floating))

    def load():
        below = tiny_model(0, **SIZES)
        below.set_dtype(mx.bfloat16)
        return below

    shelf, rows = Shelf(), examples(4, 2)
    frozen = FrozenLayers(model.args, 5, load, shelf)
    first, second = (frozen.make_batch(rows).activations for _ in range(2))
    assert first.x.dtype == first.keys.dtype == mx.bfloat16
    assert mx.array_equal(first.x, second.x)
    assert mx.array_equal(first.keys, second.keys)
    assert next(iter(shelf.values()))[1].dtype == np.int8


def test_an_example_without_trained_tokens_changes_nothing():
    model, rows = trained("last-2"), examples(3, 2)
    none = Tokens(rows[0].ids, np.zeros(len(rows[0]), np.float32), "line 9")
    expected, _ = loss_and_gradients(model, make_batch([*rows, none]))
    found, _ = loss_and_gradients(model, frozen_of(model).make_batch([*rows, none]))
    assert found == pytest.approx(expected, rel=1e-5)


def test_where_nothing_can_be_kept():
    everywhere = with_adapter(tiny_model(0, **SIZES))
    assert first_trained_layer(everywhere) == 0
    whole = tiny_model(0, **SIZES)
    assert first_trained_layer(whole) == 0  # the embedding is trained
