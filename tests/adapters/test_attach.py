"""Adapters on a model: nothing changes at B = 0, removing restores, fusing equals."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.adapters import (
    LoRAConfig,
    adapter_shapes,
    adapter_weights,
    add_adapter,
    fuse_adapter,
    has_adapter,
    remove_adapter,
    set_adapter_weights,
)
from mlx_afm.errors import AdapterError, ConfigError, TensorsError
from tiny import random_tokens, tiny_config, tiny_model, with_adapter

TOKENS = random_tokens((2, 9))


def test_a_new_adapter_changes_nothing_to_the_last_bit():
    model = tiny_model()
    before = model(TOKENS)
    add_adapter(model, LoRAConfig(rank=4))
    assert mx.array_equal(model(TOKENS), before)


def test_removing_restores_to_the_last_bit():
    model = tiny_model()
    before, names = model(TOKENS), {name for name, _ in tree_flatten(model.parameters())}
    with_adapter(model)
    assert not mx.allclose(model(TOKENS), before)
    remove_adapter(model)
    assert mx.array_equal(model(TOKENS), before)
    assert {name for name, _ in tree_flatten(model.parameters())} == names
    assert not has_adapter(model)


@pytest.mark.parametrize("sizes", [{"kv_quant": False}, {}, {"num_kv_reuse_layers": 0}], ids=["plain", "kv", "uniform"])
def test_fused_equals_unfused(sizes):
    model = with_adapter(tiny_model(**sizes))
    adapted = model(TOKENS)
    fuse_adapter(model)
    assert not has_adapter(model)
    allowed = tolerances.LOGITS_QUANTIZED if model.args.kv_quant else tolerances.FUSED
    assert mx.abs(model(TOKENS) - adapted).max().item() <= allowed


def test_fused_weight_is_the_sum_rounded_once():
    model = with_adapter(tiny_model())
    name = "model.layers.1.self_attn.qkv_proj"
    weights = adapter_weights(model)
    base = np.array(dict(tree_flatten(model.parameters()))[f"{name}.linear.weight"], np.float64)
    parts = [
        np.array(weights[f"{name}.{part}.lora_a"], np.float64) @ np.array(weights[f"{name}.{part}.lora_b"])
        for part in "qkv"
    ]
    expected = base + 0.5 * np.concatenate(parts, axis=1).T
    fuse_adapter(model)
    fused = np.array(dict(tree_flatten(model.parameters()))[f"{name}.weight"])
    assert np.abs(fused - expected).max() < 1e-6


def test_names_shapes_and_count():
    model, config = tiny_model(), LoRAConfig(rank=4)
    add_adapter(model, config)
    shapes = {name: tuple(array.shape) for name, array in adapter_weights(model).items()}
    assert shapes == adapter_shapes(tiny_config(), config)
    assert len(shapes) == 14 * 3 + 10 * 2
    assert shapes["model.layers.0.self_attn.qkv_proj.k.lora_b"] == (4, 16)
    assert shapes["model.kv_reuse_layers.1.mlp.down_proj.lora_a"] == (104, 4)
    assert not any(name.rsplit(".", 1)[-1].isdigit() for name in shapes), "mlx-lm rejects names that end in numbers"
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == set(shapes)
    assert all(array.dtype == mx.float32 for array in adapter_weights(model).values())


def test_start_values_are_those_of_the_toolkit_and_of_the_seed():
    arrays = []
    for seed in (0, 0, 1):
        model = tiny_model()
        add_adapter(model, LoRAConfig(rank=16), seed=seed)
        arrays.append(adapter_weights(model)["model.layers.0.mlp.down_proj.lora_a"])
    assert mx.array_equal(arrays[0], arrays[1])
    assert not mx.array_equal(arrays[0], arrays[2])
    assert np.std(np.array(arrays[0])) == pytest.approx(104**-0.5, rel=0.1)
    other = adapter_weights(model)["model.layers.1.mlp.down_proj.lora_a"]
    assert not mx.array_equal(arrays[2], other), "each place has a key of its own"


def test_some_targets_only():
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=2, targets=("k", "o")))
    names = set(adapter_weights(model))
    assert all(".k." in name or "out_proj" in name for name in names)
    assert len(names) == 2 * (3 + 5)
    model(TOKENS)
    fuse_adapter(model)


def test_dropout_is_for_training_only():
    model = with_adapter(tiny_model(), LoRAConfig(rank=4, dropout=0.5))
    model.eval()
    still = model(TOKENS)
    assert mx.array_equal(model(TOKENS), still)
    model.train()
    assert not mx.allclose(model(TOKENS), still)


def test_sixteen_bit_base_keeps_float32_adapters_and_sixteen_bit_logits():
    model = tiny_model()
    model.apply(lambda array: array.astype(mx.bfloat16))
    with_adapter(model)
    assert model(TOKENS).dtype == mx.bfloat16
    assert all(array.dtype == mx.float32 for array in adapter_weights(model).values())
    fuse_adapter(model)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.bfloat16}


def test_a_second_adapter_and_foreign_values_are_refused():
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=4))
    with pytest.raises(AdapterError, match="has an adapter already"):
        add_adapter(model, LoRAConfig(rank=4))
    weights = adapter_weights(model)
    name = "model.layers.0.self_attn.out_proj.lora_a"
    weights[name] = mx.zeros((3, 3))
    weights["extra.lora_a"] = mx.zeros((1,))
    del weights["model.layers.2.mlp.up_proj.lora_b"]
    with pytest.raises(TensorsError) as error:
        set_adapter_weights(model, weights, where="x")
    assert f"wrong shape: {name}: expected (32, 4), found (3, 3)" in str(error.value)
    assert "surplus: extra.lora_a" in str(error.value)
    assert "missing: model.layers.2.mlp.up_proj.lora_b" in str(error.value)


def test_settings_out_of_range():
    with pytest.raises(ConfigError) as error:
        LoRAConfig(rank=0, scale=-1, dropout=1, targets=("q", "qkv"))
    assert all(name in str(error.value) for name in ("rank", "scale", "dropout", "targets"))


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_alpha_and_a_scale_below_or_above_the_default_are_refused(scale):
    with pytest.raises(ConfigError, match=f"expected alpha or scale, found alpha 16 and scale {scale}"):
        LoRAConfig(rank=8, alpha=16, scale=scale)


def test_qat_takes_all_of_q_k_and_v_or_none():
    for targets in [("o", "down"), ("q", "k", "v", "o")]:
        assert LoRAConfig(fine_tune_type="qat", targets=targets).targets == targets
    for targets in [("q",), ("k", "v", "o")]:
        with pytest.raises(ConfigError, match="qat takes all of them or none"):
            LoRAConfig(fine_tune_type="qat", targets=targets)
