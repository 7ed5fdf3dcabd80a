"""DoRA layers against a float64 loop and mlx-lm's layer; exact at the start; merged as it computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.adapters import LoRAConfig, adapter_weights, add_adapter, fuse_adapter, set_adapter_weights
from mlx_afm.errors import AdapterError
from mlx_afm.model.dora import DoRAFusedLinear, DoRALinear
from mlx_afm.model.projections import FusedLinear, Linear
from tiny import random_tokens, tiny_model

TOKENS = random_tokens((2, 9))


def filled(layer, seed=0):
    """Gives every pair a B that is not zero and every m another value."""
    rng = np.random.default_rng(seed)
    changed = [
        (name, mx.array(array + 0.3 * rng.standard_normal(array.shape), mx.float32))
        for name, array in ((name, np.array(array)) for name, array in tree_flatten(layer.parameters()))
        if name.endswith(("lora_b", "m"))
    ]
    layer.load_weights(changed, strict=False)
    return layer


def loop(x, weight, lora_a, lora_b, m, scale):
    """The paper's formula, row by row in float64."""
    x, weight, lora_a, lora_b, m = (np.array(array, np.float64) for array in (x, weight, lora_a, lora_b, m))
    outputs = []
    for row in range(len(weight)):
        adapted = weight[row] + scale * (lora_a @ lora_b[:, row])
        outputs.append(m[row] / np.sqrt(sum(value * value for value in adapted)) * (x @ adapted))
    return np.stack(outputs, axis=-1)


def test_the_formula():
    mx.random.seed(0)
    layer = filled(DoRALinear(Linear(7, 5), 3, scale=1.5))
    x = mx.random.normal((4, 7))
    expected = loop(x, layer.linear.weight, layer.lora_a, layer.lora_b, layer.m, 1.5)
    assert np.abs(np.array(layer(x)) - expected).max() < 1e-5


def test_the_formula_of_each_part():
    mx.random.seed(1)
    layer = filled(DoRAFusedLinear(FusedLinear(8, 8, 4), 2, scale=0.5, parts=("q", "v")))
    x = mx.random.normal((3, 8))
    q, k, v = layer(x)
    rows = mx.split(layer.linear.weight, [8, 12])
    for ours, weight, part in ((q, rows[0], layer.q), (v, rows[2], layer.v)):
        expected = loop(x, weight, part.lora_a, part.lora_b, part.m, 0.5)
        assert np.abs(np.array(ours) - expected).max() < 1e-5
    assert mx.array_equal(k, layer.linear(x)[1])
    assert mx.allclose(layer(x, x[:1])[0], q[:1], atol=1e-6)


def test_it_is_mlx_lms_layer_with_its_gradients():
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    mx.random.seed(2)
    ours = filled(DoRALinear(Linear(6, 4), 2, scale=2.0))
    theirs = dora.DoRALinear(6, 4, r=2, scale=2.0)
    theirs.load_weights(list(tree_flatten(ours.parameters())))
    x = mx.random.normal((5, 6))
    assert mx.allclose(ours(x), theirs(x), atol=1e-5)

    def gradients(layer):
        def loss(values):
            layer.update(values)
            return (layer(x) ** 2).sum()

        return mx.grad(loss)({name: layer[name] for name in ("lora_a", "lora_b", "m")})

    mine, other = gradients(ours), gradients(theirs)
    for name in mine:
        assert mx.allclose(mine[name], other[name], rtol=1e-4, atol=1e-4), name
        assert mx.abs(mine[name]).max().item() > 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_at_the_start_it_changes_nothing_to_the_last_bit(dtype):
    """Each projection. In 16 bits a plain one joins the residual stream in one rounding, an adapted one in two."""
    model = tiny_model()
    model.set_dtype(dtype)
    names = ("self_attn.qkv_proj", "self_attn.out_proj", "mlp.gate_proj", "mlp.down_proj")
    plain = dict(model.model.layers[0].named_modules())
    before = model(TOKENS)
    add_adapter(model, LoRAConfig(rank=4, fine_tune_type="dora"))
    adapted, after = dict(model.model.layers[0].named_modules()), model(TOKENS)
    for name in names:
        width = plain[name].weight.shape[1]
        x = mx.array(np.random.default_rng(0).standard_normal((2, 3, width)), mx.float32).astype(dtype)
        found, wanted = adapted[name](x), plain[name](x)
        pairs = zip(found, wanted) if isinstance(found, tuple) else [(found, wanted)]
        assert all(a.dtype == dtype and mx.array_equal(a, b) for a, b in pairs), name
    assert after.dtype == dtype
    if dtype == mx.float32:
        assert mx.array_equal(after, before)
    assert all(array.dtype == mx.float32 for array in adapter_weights(model).values())


def test_m_is_the_length_of_the_rows():
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=4, fine_tune_type="dora"))
    weights = adapter_weights(model)
    layer = model.model.layers[1].self_attn.qkv_proj
    lengths = np.linalg.norm(np.array(layer.linear.weight, np.float64), axis=1)
    found = np.concatenate([np.array(weights[f"model.layers.1.self_attn.qkv_proj.{part}.m"]) for part in "qkv"])
    assert np.abs(found - lengths).max() < 1e-5
    assert {name.rsplit(".", 1)[-1] for name in weights} == {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("sizes", [{"kv_quant": False}, {}], ids=["plain", "kv"])
def test_fused_equals_unfused(sizes):
    model = tiny_model(**sizes)
    add_adapter(model, LoRAConfig(rank=4, fine_tune_type="dora"))
    rng = np.random.default_rng(0)
    changed = {
        name: array if name.endswith("lora_a") else array + mx.array(0.1 * rng.standard_normal(array.shape), mx.float32)
        for name, array in adapter_weights(model).items()
    }
    set_adapter_weights(model, changed, where="test")
    before, adapted = tiny_model(**sizes)(TOKENS), model(TOKENS)
    assert not mx.allclose(before, adapted, atol=1e-2)
    fuse_adapter(model)
    allowed = tolerances.LOGITS_QUANTIZED if model.args.kv_quant else tolerances.FUSED
    assert mx.abs(model(TOKENS) - adapted).max().item() <= allowed


def test_a_row_of_zeros_stays_zero():
    linear = Linear(4, 3)
    linear.weight = mx.zeros((3, 4))
    layer = DoRALinear(linear, 2, scale=1.0)
    assert mx.array_equal(layer(mx.ones((2, 4))), mx.zeros((2, 3)))
    assert mx.array_equal(layer.fuse().weight, mx.zeros((3, 4)))


def test_over_quantized_weights():
    """The base is what the codes say; merging them needs the dense form."""
    mx.random.seed(3)
    plain, fused = Linear(64, 32).to_quantized(32, 4), FusedLinear(64, 64, 32).to_quantized(32, 4)
    x = mx.random.normal((5, 64))
    layer = DoRALinear(plain, 4, scale=1.0)
    assert mx.array_equal(layer(x), plain(x))
    filled(layer)
    expected = loop(x, plain.dense_weight(), layer.lora_a, layer.lora_b, layer.m, 1.0)
    assert np.abs(np.array(layer(x)) - expected).max() < 1e-4
    assert mx.allclose(layer.fuse(dequantize=True)(x), layer(x), atol=1e-4)
    with pytest.raises(AdapterError, match="quantized"):
        layer.fuse()
    parts = DoRAFusedLinear(fused, 4, scale=1.0)
    assert all(mx.array_equal(ours, theirs) for ours, theirs in zip(parts(x), fused(x)))
    merged = filled(parts).fuse(dequantize=True)
    assert all(mx.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(parts(x), merged(x)))


def test_full_fine_tuning_wants_a_dense_base():
    model = tiny_model()
    layer = model.model.layers[0].mlp
    layer.up_proj = layer.up_proj.to_quantized(32, 4)
    with pytest.raises(AdapterError, match=r"full fine-tuning of a quantized model .*convert -d"):
        add_adapter(model, LoRAConfig(fine_tune_type="full"))
