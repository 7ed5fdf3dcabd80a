"""Gradients that stay exactly zero in the first steps."""

import mlx.core as mx

from mlx_afm.training.health import GradientWatch

ZERO, SOME = mx.zeros((2, 2)), mx.array([[0.0, -1e-30], [0.0, 0.0]])


def test_a_tensor_is_named_if_its_gradient_is_zero_in_each_watched_step():
    watch = GradientWatch(3)
    for step, (first, second) in enumerate([(ZERO, ZERO), (ZERO, SOME), (ZERO, ZERO)]):
        assert watch.watching
        assert watch.take() == (), f"before step {step}"
        watch.add({"layer": {"lora_b": first, "lora_a": second}})
    assert not watch.watching
    assert watch.take() == ("layer.lora_b",)
    assert watch.take() == (), "it is told once"


def test_nothing_is_named_if_every_tensor_had_a_gradient():
    watch = GradientWatch(2)
    watch.add({"a": SOME, "b": ZERO})
    watch.add({"a": ZERO, "b": SOME})
    assert watch.take() == ()


def test_one_step_says_nothing():
    assert not GradientWatch(1).watching
    assert GradientWatch(2).watching
