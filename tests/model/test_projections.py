"""Modules over codes against the dense modules of the same values, in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm.model.packed as packed_module
import tolerances
from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.model import backend
from mlx_afm.model.cpu import quantized as cpu_quantized
from mlx_afm.model.packed import Packed
from mlx_afm.model.projections import (
    BalancedLinear,
    Embedding,
    FusedLinear,
    Linear,
    QuantizedEmbedding,
    QuantizedFusedLinear,
    QuantizedLinear,
    dequantize_modules,
    is_quantized,
    pack,
)
from mlx_afm.quant import Scheme, dequantize_balanced, pack_codes, quantize_balanced
from mlx_afm.quant.balanced import rounded
from mlx_afm.quant.scheme import BITS, GROUP_SIZES
from tiny import tiny_model, with_adapter

SCHEMES = [
    *(Scheme(bits=bits, group_size=size) for bits, size in zip(BITS["affine"], (32, 64, 128, 32, 64, 32))),
    *(Scheme(mode="balanced", group_size=size) for size in GROUP_SIZES["balanced"]),
    *(Scheme(mode=mode) for mode in ("mxfp4", "nvfp4", "mxfp8")),
]
ROWS = (1, 3, 40)  # inputs: the quantized product, and the dense one
COLUMNS, OUTPUTS = 128, 48


def random(shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def linear(dtype=mx.float32):
    return Linear(1, 1).with_weight(random((OUTPUTS, COLUMNS)).astype(dtype))


def quantized(module, scheme):
    return module.to_quantized(scheme.group_size, scheme.bits, scheme.mode)


def close(found, wanted, tolerance=1e-6):
    wanted = np.asarray(wanted)
    assert np.abs(np.array(found.astype(mx.float32)) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_product_and_its_gradient_are_the_dense_ones(scheme, rows):
    layer, x = quantized(linear(), scheme), random((2, rows, COLUMNS), seed=1)
    weight = np.array(layer.dense_weight()).astype(np.float64)
    wanted = np.array(x).astype(np.float64) @ weight.T
    close(layer(x), wanted)
    gradient = mx.grad(lambda x: mx.sum(layer(x) ** 2))(x)
    close(gradient, 2 * wanted @ weight)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.mode != "balanced"], ids=str)
def test_the_values_are_mlxs_own(scheme):
    weight = random((OUTPUTS, COLUMNS))
    arrays, settings = mx.quantize(weight, **scheme.to_dict()), scheme.to_dict()
    biases = arrays[2] if len(arrays) > 2 else None
    wanted = mx.dequantize(arrays[0], arrays[1], biases, dtype=mx.float32, **settings)
    close(pack(weight, scheme).dense(), np.array(wanted), 1e-7)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("kind", ["stored", "free"])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_weights_on_the_balanced_grid_are_held_exactly(dtype, kind, per_tensor, tmp_path):
    """Packed, saved, loaded, made dense: the same bits. And their product is the dense one."""
    name, rng = str(dtype).removeprefix("mlx.core."), np.random.default_rng(0)
    scales = np.repeat(rng.uniform(0.01, 0.1, 1 if per_tensor else OUTPUTS), OUTPUTS if per_tensor else 1)
    scales = rounded(scales.astype(np.float32), name) if kind == "stored" else scales.astype(np.float32)
    levels = rng.integers(0, 4, (OUTPUTS, COLUMNS)).astype(np.float32) - np.float32(1.5)
    weight = rounded(levels * scales[:, None], name)
    done = quantize_balanced(weight, dtype=name)
    mx.save_safetensors(
        str(tmp_path / "x.safetensors"), {"w": mx.array(pack_codes(done.codes_ON)), "s": mx.array(done.scales_O)}
    )
    loaded = mx.load(str(tmp_path / "x.safetensors"))
    packed = Packed(Scheme(mode="balanced"), loaded["w"], loaded["s"])
    assert mx.array_equal(packed.dense(dtype), mx.array(weight).astype(dtype))
    if dtype == mx.float32:
        for rows in ROWS:
            x = random((rows, COLUMNS), seed=rows)
            close(packed.times(x), np.array(x).astype(np.float64) @ weight.astype(np.float64).T, 5e-7)


def test_balanced_codes_made_by_mlx_are_those_made_by_numpy():
    """On the grid to the bit; off it the scale may differ in its last digits, where the error is flat."""
    weight = np.array(random((16, COLUMNS)))
    weight[:8] = np.sign(weight[:8]) * np.where(np.abs(weight[:8]) > 1, 1.5, 0.5) * np.arange(8)[:, None]
    done, packed = quantize_balanced(weight), pack(mx.array(weight), Scheme(mode="balanced"))
    np.testing.assert_array_equal(np.array(packed.scales)[:8], done.scales_O[:8])
    np.testing.assert_array_equal(np.array(packed.weight)[1:8], pack_codes(done.codes_ON)[1:8])
    np.testing.assert_allclose(np.array(packed.scales), done.scales_O, rtol=1e-3)
    errors = [
        np.sum((back - weight) ** 2)
        for back in (np.array(packed.dense()), dequantize_balanced(done.codes_ON, done.scales_O))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_16_bits_stay_16_bits_and_lose_no_more_than_a_rounding(scheme, dtype):
    layer = quantized(linear(dtype), scheme)
    unit = float(np.finfo(np.float16).eps if dtype == mx.float16 else 2**-7)
    for rows in ROWS:
        x = random((rows, COLUMNS), seed=2).astype(dtype)
        wanted = np.array(x.astype(mx.float32)).astype(np.float64) @ np.array(layer.packed.dense()).astype(np.float64).T
        y = layer(x)
        assert y.dtype == layer.dense_weight().dtype == dtype
        close(y, wanted, unit)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_kernel_of_the_gpu_path_gives_the_same(scheme, monkeypatch):
    """It runs here as well, only slowly."""
    layer, x = quantized(linear(), scheme), random((12, COLUMNS), seed=3)
    slow = layer(x)
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    close(layer(x), np.array(slow))
    half, narrow = x.astype(mx.float16), quantized(linear(mx.float16), scheme)
    wanted = np.array(half.astype(mx.float32)) @ np.array(narrow.packed.dense()).T
    close(narrow(half), wanted, 0.02)  # the CPU sums in float16


@pytest.mark.parametrize("scheme", [Scheme(mode="balanced", group_size=32), Scheme(bits=4)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_a_compiled_product_and_gradient_are_the_same(scheme, rows, monkeypatch):
    for on_cpu in (True, False):
        packed_module._unit_grid.cache_clear()  # constants made while a trace is on must outlive it
        monkeypatch.setattr(backend, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        layer, x = quantized(linear(), scheme), random((rows, COLUMNS), seed=8)
        compiled = mx.compile(mx.value_and_grad(lambda x, layer=layer: mx.sum(layer(x) ** 2)))
        value, gradient = compiled(x)
        close(gradient, np.array(mx.grad(lambda x, layer=layer: mx.sum(layer(x) ** 2))(x)))
        assert value.item() == pytest.approx(mx.sum(layer(x) ** 2).item(), rel=1e-5)


def test_sums_beyond_float16_do_not_overflow_before_the_scale(monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    weight = mx.full((32, COLUMNS), 0.015, mx.float16)
    weight[0, 0] = 0.005
    y = quantized(Linear(1, 1).with_weight(weight), Scheme(mode="balanced"))(mx.full((1, COLUMNS), 1000, mx.float16))
    assert mx.isfinite(y).all()
    assert y[0, 1].item() == pytest.approx(1.5 * 10 * COLUMNS, rel=0.01)


@pytest.mark.parametrize("scheme", [Scheme(mode="balanced"), Scheme(bits=4), Scheme(mode="nvfp4")], ids=str)
def test_the_fused_projection_slices_its_rows(scheme):
    module = FusedLinear(COLUMNS, 64, 32)
    layer, x, queries = quantized(module, scheme), random((2, 9, COLUMNS), 4), random((2, 3, COLUMNS), 5)
    assert isinstance(layer, QuantizedFusedLinear)
    dense = layer.dequantized()
    for found, wanted in zip((*layer(x), *layer(x, queries)), (*dense(x), *dense(x, queries)), strict=True):
        close(found, np.array(wanted))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_embedding_looks_up_and_is_the_head(scheme, dtype, monkeypatch):
    monkeypatch.setattr(cpu_quantized, "DENSE_VALUES", 1000)  # the head in several pieces
    table = Embedding(61, COLUMNS).with_weight(random((61, COLUMNS), 6).astype(dtype))
    layer, tokens = quantized(table, scheme), mx.array([[3, 0, 60], [7, 7, 1]])
    assert isinstance(layer, QuantizedEmbedding)
    assert layer(tokens).dtype == dtype
    assert mx.array_equal(layer(tokens), layer.dense_weight()[tokens])
    x = random((40, COLUMNS), 7).astype(dtype)
    weight = np.array(layer.packed.dense()).astype(np.float64)
    wanted = np.array(x.astype(mx.float32)).astype(np.float64) @ weight.T
    close(layer.as_linear(x), wanted, 1e-6 if dtype == mx.float32 else 2**-7)
    if dtype == mx.float32:
        close(mx.grad(lambda x: layer.as_linear(x).sum())(x), np.ones((40, 61)) @ weight)


def test_modules_are_frozen_and_named_as_mlx_lm_names_them():
    layer = quantized(linear(), Scheme(mode="balanced"))
    assert isinstance(layer, BalancedLinear)
    assert set(layer.parameters()) == {"weight", "scales"}
    assert layer.scales.shape == (OUTPUTS,)
    assert layer.trainable_parameters() == {}
    affine = quantized(linear(), Scheme(bits=4))
    assert isinstance(affine, QuantizedLinear)
    assert set(affine.parameters()) == {"weight", "scales", "biases"}
    assert (affine.bits, affine.group_size, affine.mode, affine.input_dims) == (4, 64, "affine", COLUMNS)


def test_nothing_is_computed_before_it_is_needed():
    """mlx-lm's loader quantizes random weights that it then throws away."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    quantized(Linear(1 << 14, 1 << 14), Scheme(mode="balanced"))
    quantized(Linear(1 << 14, 1 << 14), Scheme(bits=4))
    assert mx.get_peak_memory() - before < 1 << 20


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="groups"):
        Linear(48, 8).to_quantized(32, 4, "affine")
    with pytest.raises(ConfigError, match="activations"):
        Linear(64, 8).to_quantized(16, 4, "nvfp4", quantize_input=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("scheme", [Scheme(mode="balanced"), Scheme(bits=4), Scheme(mode="mxfp8")], ids=str)
def test_an_adapter_on_codes_is_merged_only_into_dense_weights(scheme, kind):
    from mlx_afm.adapters import LoRAConfig, fuse_adapter

    model = tiny_model(hidden_dim=64, hidden_dim_scale_factor=3)
    nn.quantize(model, scheme.group_size, scheme.bits, mode=scheme.mode)
    with_adapter(model, LoRAConfig(rank=4, fine_tune_type=kind))
    tokens = mx.array([[5, 1, 9, 30, 2, 2]])
    live = model(tokens)
    with pytest.raises(AdapterError, match="without moving them"):
        fuse_adapter(model)
    fuse_adapter(model, dequantize=True)
    assert not is_quantized(model)
    assert mx.abs(model(tokens) - live).max().item() < tolerances.LOGITS_QUANTIZED


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_adapters_on_codes_get_the_gradients_of_the_dense_base(scheme):
    sizes = {"hidden_dim": 128, "hidden_dim_scale_factor": 2, "kv_quant": False}  # no value may fall to another step
    tokens, gradients = mx.array([[5, 1, 9, 30, 2, 2, 11, 8]]), []
    for dense in (False, True):
        model = tiny_model(**sizes)
        nn.quantize(model, scheme.group_size, scheme.bits, mode=scheme.mode)
        if dense:
            dequantize_modules(model)
        with_adapter(model)
        model.train()

        def loss(model):
            return mx.mean(mx.square(model.logits(model.hidden(tokens))))

        gradients.append(dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1])))
    assert set(gradients[0]) == set(gradients[1])
    for name, wanted in gradients[1].items():
        assert mx.linalg.norm(gradients[0][name] - wanted, stream=mx.cpu) <= 1e-5 * mx.linalg.norm(
            wanted, stream=mx.cpu
        ), name


def test_a_model_is_quantized_by_mlx_and_made_dense_again():
    model = tiny_model(hidden_dim=64, hidden_dim_scale_factor=3)
    nn.quantize(model, 32, 4)
    assert isinstance(model.model.layers[0].self_attn.qkv_proj, QuantizedFusedLinear)
    tokens = mx.array([[5, 1, 9, 30, 2, 2]])
    before = model(tokens)
    dequantize_modules(model)
    assert mx.abs(model(tokens) - before).max().item() < tolerances.LOGITS_QUANTIZED


@pytest.mark.parametrize("layer", [linear(), FusedLinear(COLUMNS, 32, 8)], ids=["linear", "fused"])
def test_an_adapter_with_default_settings_is_that_of_the_dense_layer(layer):
    for each in (layer, quantized(layer, Scheme(bits=4, group_size=32))):
        adapted = each.to_lora()
        matrices = {a.shape for name, a in tree_flatten(adapted.parameters()) if name.endswith("lora_a")}
        assert (adapted.scale, matrices) == (0.5, {(COLUMNS, 32)})


def test_full_fine_tuning_of_codes_is_refused():
    from mlx_afm.adapters import LoRAConfig, add_adapter

    model = tiny_model(hidden_dim=64, hidden_dim_scale_factor=3)
    nn.quantize(model, 32, 4)
    with pytest.raises(AdapterError, match="full fine-tuning of a quantized model"):
        add_adapter(model, LoRAConfig(fine_tune_type="full"))
