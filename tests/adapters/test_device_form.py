"""Rank, scale and untrained modules on the way to a device: what is exact is exact, the rest is measured or refused."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import tolerances
from mlx_afm.adapters import (
    Adapter,
    DeviceForm,
    LoRAConfig,
    adapter_shapes,
    adapter_weights,
    attach_adapter,
    package_tensors,
    read_adapter,
    to_device_form,
    write_adapter_package,
)
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.errors import AdapterError, TensorsError
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.formats.tensors import LazyTensor
from tiny import random_tokens, tiny_config, tiny_model, with_adapter

BASE = tiny_config(kv_quant=False)  # a value on the edge of a quantizer step may fall the other way


def new_adapter(config: LoRAConfig, seed: int = 1) -> Adapter:
    model = with_adapter(tiny_model(kv_quant=False), config, seed)
    return Adapter(config, BASE, {name: from_mlx(array) for name, array in adapter_weights(model).items()})


def gentle(adapter: Adapter) -> Adapter:
    """The adapter with a B whose update, scale included, has the size of a trained one: it moves logits by tenths."""
    factor = {True: 1, False: 0.3 / (adapter.config.scale * adapter.config.rank**0.5)}
    changed = {n: LazyTensor.of(a * np.float32(factor[n.endswith("lora_a")])) for n, a in values(adapter).items()}
    return replace(adapter, weights=changed)


def values(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read_values()) for name, tensor in adapter.weights.items()}


def logits(adapter: Adapter) -> np.ndarray:
    model = tiny_model(kv_quant=False)
    attach_adapter(model, adapter, where="test")
    return np.array(model(random_tokens((2, 9))))


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=8, alpha=24),
        LoRAConfig(rank=8, alpha=3.3),
        LoRAConfig(rank=16, alpha=16, use_rslora=True),
        LoRAConfig(rank=1, scale=2.0),
        LoRAConfig(rank=32, scale=0.1),
    ],
    ids=str,
)
def test_a_package_of_any_rank_and_scale_gives_the_same_logits(config, tmp_path):
    adapter = gentle(new_adapter(config))
    in_form, change = to_device_form(adapter)
    assert (in_form.config.rank, in_form.config.scale) == (32, 0.5)
    assert change.exact
    package = write_adapter_package(tmp_path / "a.fmadapter", in_form, Metadata(name="a"))
    wanted, back = logits(adapter), logits(read_adapter(package, BASE))
    assert np.abs(wanted - np.array(tiny_model(kv_quant=False)(random_tokens((2, 9))))).max() > 0.1, (
        "an adapter that does nothing"
    )
    assert np.abs(logits(in_form) - wanted).max() < 1e-5
    assert np.abs(back - wanted).max() < tolerances.ADAPTER_FP16


def test_padding_is_zeros_and_the_scale_goes_into_b():
    adapter = new_adapter(LoRAConfig(rank=3, scale=2.0))
    before, after = values(adapter), values(to_device_form(adapter)[0])
    assert list(after) == list(adapter_shapes(BASE, LoRAConfig()))
    for name, array in after.items():
        if name.endswith("lora_a"):
            assert np.array_equal(array[:, :3], before[name]), name
            assert not array[:, 3:].any(), name
        else:
            assert np.array_equal(array[:3], before[name] * 4), name
            assert not array[3:].any(), name


def test_an_adapter_of_the_form_is_passed_on_as_it_is():
    adapter = new_adapter(LoRAConfig(rank=4, scale=0.5))
    in_form, change = to_device_form(adapter, None, DeviceForm(rank=4))
    assert all(in_form.weights[name] is tensor for name, tensor in adapter.weights.items())
    assert list(change.notes()) == []


def test_bfloat16_is_widened():
    adapter = new_adapter(LoRAConfig(rank=4))
    narrow = {name: from_mlx(mx.array(array).astype(mx.bfloat16)) for name, array in values(adapter).items()}
    wide = values(to_device_form(Adapter(adapter.config, BASE, narrow), None, DeviceForm(rank=4))[0])
    for name, array in values(adapter).items():
        assert np.array_equal(wide[name], np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32)))


def test_a_larger_rank_is_refused_unless_reduced():
    adapter = new_adapter(LoRAConfig(rank=40))
    with pytest.raises(AdapterError, match=r"expected at most 32, found 40.*--reduce-rank"):
        to_device_form(adapter)


def test_reduction_is_the_nearest_matrix_and_its_error_is_stated():
    adapter = new_adapter(LoRAConfig(rank=6, scale=0.7))
    reduced, change = to_device_form(adapter, None, DeviceForm(rank=4, reduce_rank=True))
    before, after, errors = values(adapter), values(reduced), {}
    for name in (name.removesuffix(".lora_a") for name in before if name.endswith(".lora_a")):
        whole = 0.7 * before[f"{name}.lora_a"].astype(np.float64) @ before[f"{name}.lora_b"]
        found = 0.5 * after[f"{name}.lora_a"].astype(np.float64) @ after[f"{name}.lora_b"]
        # Eckart and Young: no matrix of rank 4 is nearer than what the other singular values weigh.
        weights = np.linalg.svd(whole, compute_uv=False)
        errors[name] = np.linalg.norm(weights[4:]) / np.linalg.norm(weights)
        assert np.linalg.norm(whole - found) / np.linalg.norm(whole) == pytest.approx(errors[name], rel=1e-4)
    assert change.reduction_errors == pytest.approx(errors, rel=1e-9)
    assert change.max_reduction_error == pytest.approx(max(errors.values()))
    assert change.mean_reduction_error == pytest.approx(np.mean(list(errors.values())))
    assert not change.exact
    assert f"relative error of a module's update {change.max_reduction_error:.3g} at most" in next(change.notes())


def test_reducing_what_has_the_smaller_rank_loses_nothing():
    small = new_adapter(LoRAConfig(rank=4))
    wide = {}  # the same update, said with rank 8
    for name, array in values(small).items():
        twice = np.concatenate([array, array], axis=1 if name.endswith("lora_a") else 0)
        wide[name] = LazyTensor.of((twice / np.sqrt(2)).astype(np.float32))
    reduced, change = to_device_form(
        Adapter(LoRAConfig(rank=8), BASE, wide), None, DeviceForm(rank=4, reduce_rank=True)
    )
    assert np.abs(logits(reduced) - logits(small)).max() < 1e-4
    assert change.max_reduction_error < 1e-6


def test_a_module_narrower_than_the_rank_is_reduced_exactly():
    adapter = new_adapter(LoRAConfig(rank=40))  # keys and values are 16 wide
    reduced, change = to_device_form(adapter, None, DeviceForm(reduce_rank=True))
    assert reduced.weights["model.layers.0.self_attn.qkv_proj.k.lora_b"].read_values().shape == (32, 16)
    assert list(change.reduction_errors) == ["model.layers.0.self_attn.qkv_proj.k"], "only what is read is decomposed"
    assert change.max_reduction_error < 1e-7


def test_an_adapter_that_does_nothing_can_be_reduced():
    adapter = new_adapter(LoRAConfig(rank=6))
    zero = {name: LazyTensor.of(array * name.endswith("lora_a")) for name, array in values(adapter).items()}
    reduced, change = to_device_form(Adapter(adapter.config, BASE, zero), None, DeviceForm(rank=4, reduce_rank=True))
    assert not any(array.any() for name, array in values(reduced).items() if name.endswith("lora_b"))
    assert change.max_reduction_error == 0


def test_values_that_are_no_numbers_cannot_be_reduced():
    adapter = new_adapter(LoRAConfig(rank=6))
    name = "model.layers.1.mlp.up_proj.lora_b"
    bad = {**adapter.weights, name: LazyTensor.of(np.full((6, BASE.feed_forward_dim), np.nan, np.float32))}
    reduced, _ = to_device_form(Adapter(adapter.config, BASE, bad), None, DeviceForm(rank=4, reduce_rank=True))
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.up_proj: values are infinite"):
        reduced.weights[name].read_values()


PARTIAL = [
    LoRAConfig(rank=4, targets=("q", "v")),
    LoRAConfig(rank=4, layers="ordinary"),
    LoRAConfig(rank=4, targets=("down",), layers="last-2"),
]


@pytest.mark.parametrize("config", PARTIAL, ids=str)
def test_untrained_modules_carry_the_base_models_own_tensors(config):
    adapter, own = new_adapter(config), new_adapter(LoRAConfig(rank=2, scale=1.5), seed=9)
    in_form, change = to_device_form(adapter, own)
    after, trained, base = values(in_form), values(adapter), values(own)
    for name, array in after.items():
        a = name.endswith("lora_a")
        if name in trained:
            assert np.array_equal(array[:, :4] if a else array[:4], trained[name]), name
        else:
            assert np.array_equal(array[:, :2] if a else array[:2], base[name] * (1 if a else 3)), name
    assert change.filled_from == "base model"
    assert len(change.untrained) == (len(after) - len(trained)) / 2
    assert "the base model's own tensors" in " ".join(change.notes())


@pytest.mark.parametrize("config", PARTIAL, ids=str)
def test_without_the_base_models_tensors_zeros_must_be_asked_for(config):
    adapter = new_adapter(config)
    lacking = replace(adapter, weights=dict(list(adapter.weights.items())[:2]))
    for own in (None, lacking):
        with pytest.raises(AdapterError, match=r"modules were not trained(.|\n)*--model(.|\n)*--zero-untrained"):
            to_device_form(adapter, own)
    in_form, change = to_device_form(adapter, None, DeviceForm(zero_untrained=True))
    assert change.filled_from == "zeros"
    assert not any(array.any() for name, array in values(in_form).items() if name not in adapter.weights)
    assert np.abs(logits(in_form) - logits(adapter)).max() < 1e-5


WEIGHTS = "low-rank updates, not weights"


@pytest.mark.parametrize(("kind", "reason"), [("dora", "magnitudes"), ("full", WEIGHTS), ("qat", WEIGHTS)])
def test_what_has_no_low_rank_form_is_refused_with_the_reason(kind, reason):
    config = LoRAConfig(rank=4, fine_tune_type=kind)
    weights = {name: LazyTensor.of(np.ones(shape, np.float32)) for name, shape in adapter_shapes(BASE, config).items()}
    with pytest.raises(AdapterError, match=reason):
        to_device_form(Adapter(config, BASE, weights), None, DeviceForm(zero_untrained=True, reduce_rank=True))


def test_tensors_that_the_configuration_does_not_name_are_refused():
    adapter = new_adapter(LoRAConfig(rank=4))
    for config in (LoRAConfig(rank=4, targets=("q",)), LoRAConfig(rank=5)):
        with pytest.raises(TensorsError, match="configuration its own"):
            to_device_form(replace(adapter, config=config))


def test_the_form_is_what_a_package_takes():
    tensors = package_tensors(to_device_form(new_adapter(LoRAConfig(rank=3, scale=2.0)))[0])
    assert next(iter(tensors)).endswith("layer_0.attention.qkv_transform.adapters.base_adapter.lora_0.a_transpose")
    assert next(iter(tensors.values())).shape == (32, 32)


def test_an_adapter_with_default_settings_has_the_form_already():
    form = DeviceForm()
    assert (LoRAConfig().rank, LoRAConfig().scale) == (form.rank, 0.5) == (32, 0.5)
