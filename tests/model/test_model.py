"""The model against slow loops, and the properties everything else relies on."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import tolerances
from mlx_afm.errors import ConfigError
from mlx_afm.model import Model
from mlx_afm.model.layers import fake_quantize, rotary_frequencies, rotary_tables, rotate
from reference import attention_loop
from tiny import random_tokens, tiny_config, tiny_model, with_adapter


def most(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize(
    "sizes",
    [{}, {"kv_quant": False}, {"num_heads": 8, "num_kv_heads": 1}, {"num_kv_reuse_layers": 0, "num_layers": 3}],
    ids=["default", "plain", "heads", "uniform"],
)
def test_logits_equal_float64_loops(sizes):
    model = tiny_model(**sizes)
    weights = {name: np.array(array, np.float64) for name, array in tree_flatten(model.parameters())}
    tokens = random_tokens((1, 9))
    expected = attention_loop.logits(weights, model.args, tokens[0].tolist())
    allowed = tolerances.LOGITS_QUANTIZED if model.args.kv_quant else tolerances.LOGITS
    assert np.abs(np.array(model(tokens)[0]) - expected).max() <= allowed


@pytest.mark.parametrize("split", range(1, 8))
def test_cached_equals_uncached_for_every_split(split):
    model, tokens = tiny_model(), random_tokens((2, 8))
    cache = model.make_cache()
    parts = [model(tokens[:, :split], cache=cache), model(tokens[:, split:], cache=cache)]
    assert most(mx.concatenate(parts, axis=1), model(tokens)) <= tolerances.SAME_ARITHMETIC


def test_cache_grows_past_its_step_and_can_be_trimmed():
    model, tokens = tiny_model(), random_tokens((1, 300))
    cache = model.make_cache()
    model(tokens[:, :250], cache=cache)
    model(random_tokens((1, 20), seed=9), cache=cache)
    assert [layer.trim(20) for layer in cache] == [20] * len(cache)
    last = model(tokens[:, 250:], cache=cache)
    assert most(last, model(tokens)[:, 250:]) <= tolerances.LOGITS


@pytest.mark.parametrize("with_cache", [False, True], ids=["plain", "cached"])
def test_needed_positions_are_exact(with_cache):
    model, tokens = tiny_model(), random_tokens((2, 10))
    needed = mx.array([[9, 3, 0], [1, 2, 9]])
    whole = model.hidden(tokens)
    if with_cache:
        cache = model.make_cache()
        model.hidden(tokens[:, :4], cache=cache)
        some = model.hidden(tokens[:, 4:], cache=cache, output_positions=mx.array([[5, 0], [1, 2]]))
        expected = mx.take_along_axis(whole, mx.array([[9, 4], [5, 6]])[..., None], axis=1)
    else:
        some = model.hidden(tokens, output_positions=needed)
        expected = mx.take_along_axis(whole, needed[..., None], axis=1)
    assert most(some, expected) <= tolerances.SAME_ARITHMETIC


def test_needed_positions_give_the_same_gradients():
    model, tokens = with_adapter(tiny_model()), random_tokens((2, 10))
    needed = mx.array([[9, 3], [1, 9]])

    def only_needed(model):
        return model.hidden(tokens, output_positions=needed).square().sum()

    def everything(model):
        return mx.take_along_axis(model.hidden(tokens), needed[..., None], axis=1).square().sum()

    pairs = zip(*(tree_flatten(nn.value_and_grad(model, f)(model)[1]) for f in (only_needed, everything)))
    for (name, some), (_, whole) in pairs:
        assert mx.linalg.norm(some - whole, stream=mx.cpu) <= 1e-4 * mx.linalg.norm(whole, stream=mx.cpu), name


def test_documents_of_a_packed_row_do_not_see_each_other():
    model = tiny_model()
    first, second = random_tokens((1, 5), seed=1), random_tokens((1, 4), seed=2)
    row = mx.concatenate([first, second, mx.zeros((1, 2), mx.int32)], axis=1)
    documents = mx.array([[1] * 5 + [2] * 4 + [0] * 2])
    packed = model.logits(model.hidden(row, documents=documents))
    assert most(packed[:, :5], model(first)) <= tolerances.SAME_ARITHMETIC
    assert most(packed[:, 5:9], model(second)) <= tolerances.SAME_ARITHMETIC
    needed = model.logits(model.hidden(row, documents=documents, output_positions=mx.array([[8, 4]])))
    assert most(needed, packed[:, [8, 4]]) <= tolerances.SAME_ARITHMETIC


def test_an_interrupted_document_goes_on_counting():
    """Ids 1 1 2 2 1 1 are positions 0 1 0 1 2 3: the second half of document 1 sees its first half."""
    model = tiny_model()
    tokens = random_tokens((1, 6))
    packed = model.logits(model.hidden(tokens, documents=mx.array([[1, 1, 2, 2, 1, 1]])))
    alone = model(mx.concatenate([tokens[:, :2], tokens[:, 4:]], axis=1))
    assert most(packed[:, 4:], alone[:, 2:]) <= tolerances.SAME_ARITHMETIC


def test_explicit_positions():
    """Tokens at equal positions see each other, so their order does not matter."""
    model, tokens = tiny_model(), random_tokens((1, 6))
    counted = model.hidden(tokens, positions=mx.arange(6)[None])
    assert most(counted, model.hidden(tokens)) <= tolerances.SAME_ARITHMETIC
    same = mx.zeros((1, 6), mx.int32)
    equal, turned = model.hidden(tokens, positions=same), model.hidden(tokens[:, ::-1], positions=same)
    assert most(equal[:, ::-1], turned) <= 1e-4


def test_wrong_number_of_caches_and_documents_with_cache_are_refused():
    model, tokens = tiny_model(), random_tokens((1, 3))
    with pytest.raises(ConfigError, match=r"wrong number of caches \(expected 3, found 5\)"):
        model(tokens, cache=model.make_cache() + model.make_cache()[:2])
    with pytest.raises(ConfigError, match="either cache or documents"):
        model.hidden(tokens, cache=model.make_cache(), documents=mx.ones((1, 3)))


def test_fake_quantizer_values_and_straight_through_gradient():
    x = mx.array([0.24, 0.25, 0.26, -0.75, 100.0, -100.0])
    scale = mx.array(0.1)
    # 2.5 rounds to the even 2; -7.5 to -8; beyond the range it clamps at 127 and -128 steps.
    expected = np.clip(np.rint(np.array(x) / np.float32(0.1)), -128, 127) * np.float32(0.1)
    assert np.array_equal(np.array(fake_quantize(x, scale)), expected.astype(np.float32))
    assert np.array(fake_quantize(x, scale))[-2:].tolist() == [np.float32(12.7), np.float32(-12.8)]
    gradient = mx.grad(lambda x: (fake_quantize(x, scale) * mx.arange(6)).sum())(x)
    assert gradient.tolist() == [0, 1, 2, 3, 4, 5]


def test_fake_quantizer_computes_in_float32_and_keeps_the_dtype():
    x = mx.array(np.linspace(-3, 3, 101), mx.float32)
    scale = mx.array(0.0173)
    half = fake_quantize(x.astype(mx.bfloat16), scale)
    assert half.dtype == mx.bfloat16
    assert mx.array_equal(half, fake_quantize(x.astype(mx.bfloat16).astype(mx.float32), scale).astype(mx.bfloat16))


def test_rotary_tables_follow_the_recipe_far_out():
    config = tiny_config(hidden_dim=128, num_heads=1, num_kv_heads=1)
    half = 64
    exponents = np.arange(half) * ((2 / 128 - 1) / (half - 1))
    frequencies = (config.rope_theta**exponents).astype(np.float32)
    assert np.array_equal(np.array(rotary_frequencies(128, 500000.0), np.float32), frequencies)
    angles = (np.float32(4000) * frequencies).astype(np.float32)
    cos, sin = rotary_tables(mx.array([[4000]]), config, mx.float32)
    expected = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    for table, values, first_sign in zip((cos, sin), expected, (1, -1)):
        pairs = np.array(table).reshape(half, 2)
        assert np.abs(pairs - np.stack([first_sign * values, values], axis=-1)).max() < 1e-6


def test_rotate_turns_interleaved_pairs():
    config = tiny_config(hidden_dim=128, num_heads=1, num_kv_heads=1)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 128)).astype(np.float32)
    positions = np.array([[0, 7, 100], [1, 2, 4000]])
    pairs = mx.array(x).reshape(2, 3, 4, 64, 2)
    out = np.array(rotate(pairs, *rotary_tables(mx.array(positions), config, mx.float32))).reshape(x.shape)
    angles = positions[..., None, None] * np.array(rotary_frequencies(128, config.rope_theta))
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(out[..., 0::2] + 1j * out[..., 1::2], expected, atol=1e-3)
    assert np.array_equal(out[0, 0], x[0, 0])


def test_sixteen_bit_norm_rounds_the_normalized_value_and_then_its_product():
    """As every MLX model's norm does (docs/decisions/0008); the mean is not rounded before."""
    from mlx_afm.model.layers import RMSNorm

    rng = np.random.default_rng(0)
    norm = RMSNorm(64, 1e-5)
    norm.weight = mx.array(1 + 0.3 * rng.standard_normal(64), mx.float32).astype(mx.bfloat16)
    x = mx.array(rng.standard_normal((50, 64)), mx.float32).astype(mx.bfloat16)
    exact = np.array(x.astype(mx.float32), np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    wanted = mx.array(exact.astype(np.float32)).astype(mx.bfloat16) * norm.weight
    assert norm(x).dtype == mx.bfloat16
    assert mx.mean(norm(x) != wanted).item() < 0.01  # ties of the float32 value itself


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_models_stay_close_and_in_their_dtype(dtype):
    model, tokens = tiny_model(), random_tokens((1, 7))
    wanted = model(tokens)
    scales = {n: a for n, a in tree_flatten(model.parameters()) if n.endswith("_scale")}
    model.apply(lambda array: array.astype(dtype))
    model.load_weights(list(scales.items()), strict=False)
    logits = model(tokens)
    assert logits.dtype == dtype
    assert most(logits.astype(mx.float32), wanted) <= 0.15


def test_number_of_parameters_of_the_real_model():
    """Counted from the shapes alone: nothing of the 3.1 billion values is made."""
    from mlx_afm.model import AFMConfig

    model = Model(AFMConfig())
    sizes = {name: array.size for name, array in tree_flatten(model.parameters()) if not name.endswith("_scale")}
    assert sum(sizes.values()) == 3_111_368_064
    assert len(model.make_cache()) == 35
    assert len(model.layers) == 56


def test_documents_read_the_ones_they_begin_with():
    """Documents 1 1 2 2 3 of which 2 and 3 go on from 1: each is as it would be alone behind 1."""
    model, tokens = tiny_model(kv_quant=False), random_tokens((1, 5))
    placed = {
        "positions": mx.array([[0, 1, 2, 3, 2]]),
        "documents": mx.array([[1, 1, 2, 2, 3]]),
        "subtree_end": mx.array([[3, 3, 2, 2, 3]]),
    }
    packed = model.hidden(tokens, **placed)
    assert most(packed[:, :4], model.hidden(tokens[:, :4])) <= tolerances.SAME_ARITHMETIC
    alone = model.hidden(tokens[:, [0, 1, 4]])
    assert most(packed[:, 4:], alone[:, 2:]) <= tolerances.SAME_ARITHMETIC
    needed = model.hidden(tokens, output_positions=mx.array([[4, 1]]), **placed)
    assert most(needed, packed[:, [4, 1]]) <= tolerances.SAME_ARITHMETIC


def test_placements_that_exclude_each_other_are_refused():
    from mlx_afm.data import Tokens
    from mlx_afm.data.batches import pack, packed_batch

    model, ones = tiny_model(), mx.ones((1, 32), mx.int32)
    row = packed_batch(pack([Tokens(np.arange(3, dtype=np.int32), np.ones(3, np.float32), "x")]), read_tokens=2)
    with pytest.raises(ConfigError, match="packing says where tokens stand"):
        model.hidden(row.inputs_BL, packing=row.packing, documents=ones)
    with pytest.raises(ConfigError, match="subtree_end needs positions and documents"):
        model.hidden(ones, subtree_end=ones)
    with pytest.raises(ConfigError, match="either cache or documents"):
        model.hidden(row.inputs_BL, packing=row.packing, cache=model.make_cache())
