"""Weights that learn to be in codes: values and gradients against float64 loops, codes against the converter's."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.adapters import LoRAConfig, adapter_shapes, adapter_weights, add_adapter
from mlx_afm.adapters.layers import coded_projections
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.model.projections import QuantizedEmbedding, pack, quantize_modules
from mlx_afm.model.qat import QATFusedLinear, QATLinear, in_codes, on_grid, put_codes, start_qat
from mlx_afm.quant import Scheme, quantize_balanced, unpack_codes
from tiny import random_tokens, tiny_config, tiny_model

ROWS, COLUMNS = 5, 32
PATH = "model.layers.1.mlp.up_proj"


def problem(seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    scales = rng.uniform(0.3, 1.2, ROWS).astype(np.float32)  # some weights far beyond their range, some within
    return weight, scales, rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def loop(weight, scales, cotangent):
    """Values and both gradients, a weight at a time."""
    values, for_weight = np.zeros(weight.shape), np.zeros(weight.shape)
    for_scales = np.zeros(len(scales))
    for row in range(weight.shape[0]):
        s = float(scales[row])
        for column in range(weight.shape[1]):
            w, g = float(weight[row, column]), float(cotangent[row, column])
            level = min((-1.5, -0.5, 0.5, 1.5), key=lambda level: abs(w - level * s))
            values[row, column] = level * s
            if abs(w) <= 2 * s:
                for_weight[row, column] = g
                for_scales[row] += g * (level - w / s)
            else:
                for_scales[row] += g * level
    return values, for_weight, for_scales / math.sqrt(1.5 * weight.shape[1])


def test_values_and_gradients():
    weight, scales, cotangent = problem()
    values, for_weight, for_scales = loop(weight, scales, cotangent)
    outside = for_weight == 0
    assert 0 < outside.sum() < weight.size
    (found,), gradients = mx.vjp(on_grid, [mx.array(weight), mx.array(scales)], [mx.array(cotangent)])
    np.testing.assert_allclose(np.array(found), values, rtol=1e-6)
    np.testing.assert_array_equal(np.array(gradients[0]), for_weight.astype(np.float32))
    np.testing.assert_allclose(np.array(gradients[1]), for_scales, rtol=1e-5, atol=1e-5)


def test_a_scale_that_fell_to_zero_still_has_finite_values_and_gradients():
    weight, _, cotangent = problem()
    scales = mx.array([0.0, -0.1, 0.5, 1e-38, 1.0])
    (found,), gradients = mx.vjp(on_grid, [mx.array(weight), scales], [mx.array(cotangent)])
    assert all(mx.all(mx.isfinite(array)).item() for array in (found, *gradients))
    assert mx.all(mx.abs(gradients[1]) > 0).item()


def test_the_codes_are_those_that_training_used():
    weight, scales, _ = (mx.array(array) for array in problem())
    packed = in_codes(weight, scales, Scheme(mode="balanced", group_size=32))
    assert mx.array_equal(packed.dense(), on_grid(weight, scales))
    assert set(unpack_codes(np.array(packed.weight)).reshape(-1).tolist()) == {0, 1, 2, 3}


def test_the_layers_give_the_product_with_the_weights_on_the_grid():
    weight, scales, _ = (mx.array(array) for array in problem())
    x, y = (mx.array(np.random.default_rng(n).standard_normal((2, 3, COLUMNS)), mx.float32) for n in (1, 2))
    values = on_grid(weight, scales)
    assert mx.allclose(QATLinear(weight, scales)(x), x @ values.T, atol=1e-6)
    fused = QATFusedLinear(weight, scales, 3, 1)
    for found, wanted in zip(fused(x), mx.split(x @ values.T, [3, 4], axis=-1)):
        assert mx.allclose(found, wanted, atol=1e-6)
    q, k, v = fused(x, y)
    assert mx.allclose(q, y @ values[:3].T, atol=1e-6)
    assert mx.allclose(mx.concatenate([k, v], axis=-1), x @ values[3:].T, atol=1e-6)


def all_paths(model):
    return coded_projections("all", LoRAConfig().targets, model.args)


def wide_model(seed=0):
    return tiny_model(seed, hidden_dim=32, hidden_dim_scale_factor=2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_it_starts_with_the_codes_of_least_error(dtype):
    model = wide_model()
    model.apply(lambda array: array.astype(dtype))
    wanted = np.array(dict(model.named_modules())[PATH].weight.astype(mx.float32))
    start_qat(model, all_paths(model))
    module = dict(model.named_modules())[PATH]
    assert {array.dtype for _, array in tree_flatten(model.trainable_parameters())} == {mx.float32}
    made = quantize_balanced(wanted)
    np.testing.assert_array_equal(np.array(module.scales), made.scales_O)
    packed = in_codes(module.weight, module.scales, Scheme(mode="balanced", group_size=32))
    np.testing.assert_array_equal(unpack_codes(np.array(packed.weight)), made.codes_ON)


def test_what_is_trained_in_a_model_and_what_is_exported():
    """Steps with gradients for every array, then the same logits from codes."""
    model, tokens = wide_model(), random_tokens((2, 9))
    add_adapter(model, LoRAConfig(fine_tune_type="qat"))
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"{path}.{array}" for path in all_paths(model) for array in ("weight", "scales")}
    model.train()
    step = nn.value_and_grad(model, lambda model: mx.mean(mx.square(model(tokens))))
    for _ in range(3):
        _, gradients = step(model)
        assert all(mx.any(gradient).item() for _, gradient in tree_flatten(gradients))
        model.update(_moved(model.trainable_parameters(), gradients))
    weights = dict(tree_flatten(model.trainable_parameters()))
    assert {name: tuple(array.shape) for name, array in adapter_weights(model).items()} == adapter_shapes(
        model.args, LoRAConfig(fine_tune_type="qat")
    )
    model.eval()
    coded = wide_model()
    put_codes(coded, weights)
    assert mx.abs(coded(tokens) - model(tokens)).max().item() < tolerances.LOGITS_QUANTIZED
    assert mx.abs(coded(tokens) - wide_model()(tokens)).max().item() > 10 * tolerances.LOGITS_QUANTIZED


def test_the_embedding_takes_four_bits_in_training_and_behind_it():
    model, coded = wide_model(), wide_model()
    start_qat(model, all_paths(model))
    put_codes(coded, dict(tree_flatten(model.trainable_parameters())))
    wanted = pack(wide_model().model.embedding.weight, Scheme(bits=4, group_size=32)).dense()
    for each in (model, coded):
        assert isinstance(each.model.embedding, QuantizedEmbedding)
        assert mx.array_equal(each.model.embedding.packed.dense(), wanted)


def _moved(values, gradients):
    from mlx.utils import tree_map

    return tree_map(
        lambda value, gradient: value - 0.01 * gradient / (mx.abs(gradient).max() + 1e-9), values, gradients
    )


def test_chosen_layers_and_targets_alone():
    model = wide_model()
    add_adapter(model, LoRAConfig(fine_tune_type="qat", layers="1,reuse", targets=("q", "k", "v", "down")))
    found = {path for path, module in model.named_modules() if isinstance(module, (QATLinear, QATFusedLinear))}
    reuse = {f"model.kv_reuse_layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert found == {"model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.down_proj", *reuse}


@pytest.mark.parametrize(
    ("sizes", "form", "says"),
    [
        ({}, {"targets": ("q", "v")}, "q, k and v are one matrix of codes"),
        ({"hidden_dim_scale_factor": 1.25}, {}, "do not fill these widths.*--targets"),
        ({}, {"layers": "9"}, "no such layers"),
    ],
)
def test_what_cannot_be_in_codes_is_refused(sizes, form, says):
    with pytest.raises(ConfigError, match=says):
        add_adapter(tiny_model(**sizes), LoRAConfig(fine_tune_type="qat", **form))


def test_codes_are_not_trained_again():
    model = wide_model()
    quantize_modules(model, {PATH: Scheme(mode="balanced", group_size=32)}, mx.float32)
    with pytest.raises(AdapterError, match=r"quantization-aware training of a quantized model.*convert -d"):
        add_adapter(model, LoRAConfig(fine_tune_type="qat"))


def test_projections_by_target_have_the_models_shapes():
    base = tiny_config(hidden_dim_scale_factor=2)
    modules = dict(wide_model().named_modules())
    for path, shape in coded_projections("all", LoRAConfig().targets, base).items():
        assert modules[path].weight.shape == shape
