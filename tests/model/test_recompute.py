"""Recomputing in the backward pass: the same gradients, less memory, dropout the same both times."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError
from mlx_afm.model.recompute import Dropout, gradient_barrier, recomputed
from tiny import random_tokens, tiny_model, with_adapter


def gradients(model, tokens, **settings):
    def loss(model):
        return model.hidden(tokens, **settings).square().sum()

    mx.random.seed(7)
    value, found = nn.value_and_grad(model, loss)(model)
    mx.eval(value, found)
    return value.item(), {name: np.array(array, np.float64) for name, array in tree_flatten(found)}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.linalg.norm(found[1][name] - gradient) <= 1e-6 * np.linalg.norm(gradient), name


def kept(monkeypatch):
    """Turns off what layers recompute by themselves."""
    for module in ("attention", "layers"):
        monkeypatch.setattr(f"mlx_afm.model.{module}.recomputed", lambda _, function, *arrays: function(*arrays))


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("positions", [None, [[9, 3, 5], [1, 2, 9]]], ids=["all", "some"])
def test_gradients_are_those_of_keeping_everything(monkeypatch, positions, dropout):
    model, tokens = with_adapter(tiny_model(), LoRAConfig(rank=4, dropout=dropout)), random_tokens((2, 10))
    model.train()
    positions = None if positions is None else mx.array(positions)
    own = gradients(model, tokens, output_positions=positions)
    checkpointed = gradients(model, tokens, output_positions=positions, grad_checkpoint=True)
    kept(monkeypatch)
    expected = gradients(model, tokens, output_positions=positions)
    assert_same(own, expected)
    assert_same(checkpointed, expected)


def test_every_tensor_of_a_model_that_is_trained_in_full():
    model, tokens = tiny_model(kv_quant=False), random_tokens((1, 8))
    assert_same(gradients(model, tokens, grad_checkpoint=True), gradients(model, tokens))


def test_the_model_keeps_its_own_tensors():
    model = with_adapter(tiny_model())
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    gradients(model, random_tokens((1, 8)), grad_checkpoint=True)
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(array, np.array(after[name])) for name, array in before.items())


def peak(model, tokens, **settings) -> int:
    gradients(model, tokens, **settings)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradients(model, tokens, **settings)
    return mx.get_peak_memory() - before


def test_less_memory(monkeypatch):
    sizes = {"num_layers": 14, "num_kv_reuse_layers": 4, "hidden_dim": 128}
    model, tokens = with_adapter(tiny_model(**sizes)), random_tokens((4, 32))
    checkpointed, own = peak(model, tokens, grad_checkpoint=True), peak(model, tokens)
    kept(monkeypatch)
    everything = peak(model, tokens)
    assert own < 0.75 * everything
    assert checkpointed < 0.6 * own


def test_dropout_is_drawn_once():
    """The mask of the backward pass is that of the forward pass, and later draws do not notice."""
    dropout, x = Dropout(0.5), mx.ones((1000,))
    mx.random.seed(3)
    kept, later = dropout(x), mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    gradient = mx.grad(lambda x: recomputed([dropout], lambda x: dropout(x).square(), x).sum())(x)
    assert mx.array_equal(gradient, 2 * kept * kept)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), later)


def test_a_cache_cannot_be_checkpointed():
    model = tiny_model()
    with pytest.raises(ConfigError, match="a cache cannot be checkpointed"):
        model.hidden(random_tokens((1, 4)), cache=model.make_cache(), grad_checkpoint=True)


def test_gradients_that_wait_for_each_other_are_the_same():
    arrays = [mx.random.normal((3, 4), key=mx.random.key(number)) for number in range(2)]

    def plain(x, y):
        return (x * y.sin()).sum()

    found, expected = (
        mx.grad(function, argnums=(0, 1))(*arrays) for function in (lambda x, y: plain(*gradient_barrier(x, y)), plain)
    )
    for one, other in zip(found, expected):
        assert mx.array_equal(one, other)


@pytest.mark.skipif(not hasattr(mx, "reset_peak_memory"), reason="an MLX that does not count memory")
def test_more_reusing_layers_do_not_keep_their_scores():
    def peak(reusing):
        sizes = {"num_layers": 1 + reusing, "num_kv_reuse_layers": reusing, "num_heads": 8, "hidden_dim": 32}
        model = with_adapter(tiny_model(**sizes), LoRAConfig(rank=2))
        model.train()
        mx.clear_cache()
        mx.reset_peak_memory()
        gradients(model, random_tokens((1, 256)), grad_checkpoint=True)
        return mx.get_peak_memory()

    scores = 8 * 256 * 256 * 4
    assert peak(9) - peak(3) < 2 * scores  # they were kept twice a layer, 12 times in all
