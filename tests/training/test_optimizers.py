"""Groups of tensors: rates, decay and kinds of optimizer, each against its formula or `mlx.optimizers` itself."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as reference
import pytest
from mlx.utils import tree_flatten

from mlx_afm.errors import ConfigError
from mlx_afm.training import TrainConfig
from mlx_afm.training.optimizers import GroupedOptimizer


class Pair(nn.Module):
    """Two matrices and a vector, in a list, which names index by numbers."""

    def __init__(self):
        super().__init__()
        self.lora_a = mx.arange(12.0).reshape(3, 4) / 10 - 0.5
        self.lora_b = mx.ones((4, 2))
        self.m = mx.array([1.0, 2.0])


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Pair() for _ in range(3)]
        self.layers[0].freeze()


def gradients(model, seed=0):
    mx.random.seed(seed)
    return nn.utils.tree_map(lambda array: mx.random.normal(array.shape), model.trainable_parameters())


def updated(config, steps=3, rate=0.1):
    model = Stack()
    optimizer = GroupedOptimizer(config, dict(tree_flatten(model.trainable_parameters())))
    for step in range(steps):
        optimizer.set_learning_rate(rate / (step + 1))
        optimizer.update(model, gradients(model, step))
    return dict(tree_flatten(model.parameters())), optimizer


def expected(optimizer, steps=3, rate=0.1):
    model = Stack()
    for step in range(steps):
        optimizer.learning_rate = rate / (step + 1)
        optimizer.update(model, gradients(model, step))
    return dict(tree_flatten(model.parameters()))


SAME = [
    ("adamw", {}, reference.AdamW(0.1, weight_decay=0.01, bias_correction=True), 0.01),
    ("adamw", {"betas": [0.8, 0.9], "eps": 1e-4}, reference.AdamW(0.1, [0.8, 0.9], 1e-4, 0.2, True), 0.2),
    ("adam", {"bias_correction": False}, reference.Adam(0.1), 0.0),
    ("sgd", {"momentum": 0.9, "nesterov": True}, reference.SGD(0.1, 0.9, nesterov=True), 0.0),
    ("adafactor", {}, reference.Adafactor(0.1, relative_step=False, scale_parameter=False), 0.0),
]


@pytest.mark.parametrize(("name", "settings", "theirs", "decay"), SAME, ids=[f"{i[0]}-{len(i[1])}" for i in SAME])
def test_one_group_is_mlx(name, settings, theirs, decay):
    config = TrainConfig(optimizer=name, optimizer_config=settings, weight_decay=decay, no_decay=("nothing",))
    ours, wanted = updated(config)[0], expected(theirs)
    assert all(mx.array_equal(ours[key], array) for key, array in wanted.items())


def test_frozen_tensors_stay():
    ours, _ = updated(TrainConfig())
    still = dict(tree_flatten(Stack().parameters()))
    changed = {name for name, array in ours.items() if not mx.array_equal(array, still[name])}
    assert changed == {name for name in still if not name.startswith("layers.0.")}


def test_what_is_not_decayed():
    """With zero gradients only decay moves anything: w (1 - rate * decay)."""
    model = Stack()
    config = TrainConfig(weight_decay=0.5, no_decay=(".m", "lora_b"))
    optimizer = GroupedOptimizer(config, dict(tree_flatten(model.trainable_parameters())))
    optimizer.set_learning_rate(0.1)
    optimizer.update(model, nn.utils.tree_map(mx.zeros_like, model.trainable_parameters()))
    after, before = dict(tree_flatten(model.parameters())), dict(tree_flatten(Stack().parameters()))
    assert mx.allclose(after["layers.1.lora_a"], before["layers.1.lora_a"] * 0.95)
    assert mx.array_equal(after["layers.1.lora_b"], before["layers.1.lora_b"])
    assert mx.array_equal(after["layers.1.m"], before["layers.1.m"])


def test_factors_of_the_rate():
    """LoRA+: plain SGD shows the factor directly."""
    config = TrainConfig(optimizer="sgd", rate_factors={"lora_b": 16.0})
    ours, _ = updated(config, steps=1, rate=0.01)
    before, grads = dict(tree_flatten(Stack().parameters())), dict(tree_flatten(gradients(Stack())))
    for name, factor in (("layers.1.lora_a", 0.01), ("layers.1.lora_b", 0.16), ("layers.2.m", 0.01)):
        assert mx.allclose(ours[name], before[name] - factor * grads[name], atol=1e-6), name


def test_muon_takes_matrices_and_adamw_the_rest():
    config = TrainConfig(optimizer="muon", optimizer_config={"momentum": 0.8})
    ours, optimizer = updated(config)
    muon = expected(reference.Muon(0.1, momentum=0.8, weight_decay=0.01))
    adamw = expected(reference.AdamW(0.1, weight_decay=0.0, bias_correction=True))
    assert mx.allclose(ours["layers.1.lora_a"], muon["layers.1.lora_a"], atol=1e-6)
    assert mx.allclose(ours["layers.1.m"], adamw["layers.1.m"], atol=1e-6)
    assert len(optimizer.state) == 2


def test_state_goes_out_and_comes_back():
    config = TrainConfig(rate_factors={"lora_b": 2.0})
    ours, optimizer = updated(config, steps=4)
    model = Stack()
    first = GroupedOptimizer(config, dict(tree_flatten(model.trainable_parameters())))
    for step in range(2):
        first.set_learning_rate(0.1 / (step + 1))
        first.update(model, gradients(model, step))
    second = GroupedOptimizer(config, dict(tree_flatten(model.trainable_parameters())))
    second.restore(first.arrays())
    for step in (2, 3):
        second.set_learning_rate(0.1 / (step + 1))
        second.update(model, gradients(model, step))
    assert all(mx.array_equal(array, ours[name]) for name, array in tree_flatten(model.parameters()))
    assert all(mx.array_equal(array, optimizer.arrays()[name]) for name, array in second.arrays().items())
    assert second.arrays()["0.step"].item() == 4
    assert optimizer.state_bytes == sum(array.nbytes for array in optimizer.arrays().values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "lion"}, "expected one of adamw, adam, sgd, muon, adafactor, found lion"),
        ({"optimizer_config": {"momentum": 0.9}}, "adamw takes betas, eps, bias_correction, found momentum"),
        ({"optimizer_config": {"betas": 0.9}}, "expected a pair for betas, found 0.9"),
        ({"optimizer_config": {"eps": "small"}}, "expected a number for eps"),
        ({"optimizer": "muon", "optimizer_config": {"ns_steps": 0}}, "expected a count for ns_steps"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "Adam has none"),
        ({"optimizer": "sgd", "optimizer_config": {"nesterov": True}}, "nesterov needs momentum"),
        ({"rate_factors": {"lora_b": 0.0}}, "above 0 for lora_b"),
        ({"patience": -1}, "patience"),
        ({"spike_window": 0}, "spike_window"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match="training settings out of range") as error:
        TrainConfig(**settings)
    assert says in str(error.value)


def test_the_usual_decay():
    found = {name: TrainConfig(optimizer=name).weight_decay for name in ("adamw", "adam", "sgd", "muon", "adafactor")}
    assert found == {"adamw": 0.01, "adam": 0.0, "sgd": 0.0, "muon": 0.01, "adafactor": 0.0}
