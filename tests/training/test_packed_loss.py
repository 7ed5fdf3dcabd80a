"""Loss and gradient of examples in one packed row against the sum of the examples alone."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm.data import Batch, Tokens, make_batch, padded_batch
from mlx_afm.data.batches import pack, packed_batch
from mlx_afm.training.step import batch_loss
from tiny import tiny_model, with_adapter

RELATIVE = 1e-5  # of the norm of each tensor's gradient


@pytest.fixture(scope="module")
def model():
    return with_adapter(tiny_model(kv_quant=False))


def example(*ids: int, trained: tuple[int, ...] = ()) -> Tokens:
    """Trained are the given places; by default the last two."""
    weights = np.zeros(len(ids), np.float32)
    weights[list(trained) or [-2, -1]] = 1
    return Tokens(np.array(ids, np.int32), weights, "x")


def random_tree(rng: np.random.Generator, depth: int, beginning: tuple[int, ...] = ()) -> list[Tokens]:
    """Examples at the leaves, and at some inner nodes, of a random tree; weights are random too."""
    beginning += tuple(rng.integers(1, 61, rng.integers(1, 5)).tolist())
    rows = [] if depth else [beginning]
    if depth and rng.random() < 0.4:
        rows.append(beginning)
    found = [
        Tokens(np.array(row, np.int32), rng.choice([0, 0.5, 1, 2], len(row)).astype(np.float32), "x")
        for row in rows
        if len(row) > 1
    ]
    for _ in range(rng.integers(1, 4) if depth else 0):
        found += random_tree(rng, depth - 1, beginning)
    return found


PREFIX, SECOND = (5, 6, 7, 8), (9, 10, 11)
STRUCTURES = {
    "flat": [example(1, 2, 3, 4), example(4, 3, 2, 1, 6), example(7, 8, 9)],
    "one level": [example(*PREFIX, 20, 21, 22), example(*PREFIX, 30, 31), example(*PREFIX, 40, 41, 42, 43)],
    "two prompts": [
        *(example(*PREFIX, first, 21) for first in (20, 22)),
        *(example(*SECOND, first, 31) for first in (30, 32)),
    ],
    "trained turns in the prefix": [
        example(*PREFIX, 20, 21, trained=(1, 3, 5)),
        example(*PREFIX, 30, 31, 32, trained=(1, 2, 4, 6)),
    ],
    "other targets behind the same prefix": [example(*PREFIX, last, trained=(4,)) for last in (20, 21, 22, 20)],
    "identical": [example(*PREFIX, 20, 21)] * 3,
    "a prefix of another": [example(*PREFIX), example(*PREFIX, 20, 21), example(*PREFIX[:2])],
    "nothing trained in one": [
        example(*PREFIX, 20, 21),
        Tokens(np.array([5, 6, 9], np.int32), np.zeros(3, np.float32), "x"),
    ],
}
STRUCTURES |= {f"tree {seed}": random_tree(np.random.default_rng(seed), 1 + seed % 4) for seed in range(12)}


def loss_and_gradients(model, batch: Batch):
    loss, gradients = nn.value_and_grad(model, batch_loss)(model, batch)
    return loss.item(), {name: np.array(array, np.float64) for name, array in tree_flatten(gradients)}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, gradient in expected[1].items():
        assert np.linalg.norm(found[1][name] - gradient) <= RELATIVE * np.linalg.norm(gradient) + 1e-7, name


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_packed_row_is_the_sum_of_its_examples(model, name):
    rows = STRUCTURES[name]
    packed = packed_batch(pack(rows), read_tokens=0)
    alone = [loss_and_gradients(model, padded_batch([row])) for row in rows]
    sums = {tensor: sum(gradients[tensor] for _, gradients in alone) for tensor in alone[0][1]}
    assert_same(loss_and_gradients(model, packed), (sum(loss for loss, _ in alone), sums))
    assert packed.weights_BN.sum().item() == sum(row.weights[1:].sum() for row in rows)


def test_order_is_indifferent_and_the_quantizers_change_nothing():
    """The row is laid out in the order of the ids, so any order gives the same arrays."""
    model, rows = with_adapter(tiny_model()), random_tree(np.random.default_rng(5), 3)
    turned = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    first, second = (loss_and_gradients(model, packed_batch(pack(some), read_tokens=0)) for some in (rows, turned))
    assert first[0] == second[0]
    alone = sum(loss_and_gradients(model, padded_batch([row]))[0] for row in rows)
    assert first[0] == pytest.approx(alone, rel=1e-4)


def test_documents_and_last_readers_say_the_same_as_packing(model):
    """The plain form: a mask over the whole row, from the numbers of the tokens alone."""
    row = pack(random_tree(np.random.default_rng(3), 3))
    batch = packed_batch(row, read_tokens=0)
    hidden = model.hidden(batch.inputs_BL, packing=batch.packing)
    numbers = mx.arange(len(row.ids_L))[None]
    plain = model.hidden(
        batch.inputs_BL,
        positions=mx.array(row.positions_L[None]),
        documents=numbers,
        subtree_end=mx.array(row.subtree_end_L[None]),
    )
    assert mx.abs(hidden - plain).max().item() <= 1e-5


def test_make_batch_packs_where_that_holds_fewer_tokens():
    assert make_batch(STRUCTURES["identical"] * 20).packing is not None
    assert make_batch([example(*range(1, 40)), example(*range(2, 41))]).packing is None
    assert make_batch([example(*range(1, 40))]).packing is None
    batch = make_batch(STRUCTURES["identical"] * 20)
    assert batch.read_tokens == 60 * 5
    assert batch.inputs_BL.shape == (1, 32)
