"""The int8 cache against the fake quantizer: the same bits, a quarter of the memory."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.model.cache import Int8KVCache, KVCache, from_int8, to_int8
from mlx_afm.model.layers import fake_quantize
from tiny import random_tokens, tiny_model

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_the_grid_comes_back_for_every_step(dtype):
    """All 256 numbers, for steps over twelve decades (of float16, what it can hold)."""
    rng = np.random.default_rng(0)
    low, high = (-6.5, 2) if dtype == mx.float16 else (-8, 4)
    numbers = mx.array(np.arange(-128, 128, dtype=np.int8))
    for step in (10 ** rng.uniform(low, high, 2000)).astype(np.float32):
        scale = mx.array(step)
        values = fake_quantize(numbers.astype(mx.float32) * scale, scale).astype(dtype)
        found = to_int8(values, scale)
        assert mx.array_equal(found, numbers), step
        assert mx.array_equal(from_int8(found, scale, dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [(12,), (1,) * 12, (5, 1, 6), (7, 5)])
def test_logits_are_those_of_the_other_cache_to_the_bit(dtype, splits):
    model = tiny_model()
    model.set_dtype(dtype, lambda kind: kind == mx.float32)
    for layer in model.model.layers:  # steps stay float32, as in a folder
        layer.self_attn.quant_key_scale = layer.self_attn.quant_key_scale.astype(mx.float32)
        layer.self_attn.quant_value_scale = layer.self_attn.quant_value_scale.astype(mx.float32)
    tokens, start = random_tokens((2, 12)), 0
    plain, small = model.make_cache(), model.make_cache(quantized=True)
    for count in splits:
        piece = tokens[:, start : start + count]
        assert mx.array_equal(model(piece, cache=plain), model(piece, cache=small))
        start += count
    assert {cache.keys.dtype for cache in small} == {mx.int8}
    assert all(a.nbytes * plain[0].keys.dtype.size == b.nbytes for a, b in zip(small, plain))


def test_padding_and_trimming_work_as_in_the_other_cache():
    model, tokens = tiny_model(), random_tokens((2, 9))
    caches = [model.make_cache([3, 0]), model.make_cache([3, 0], quantized=True)]
    first = [model(tokens, cache=cache) for cache in caches]
    assert mx.array_equal(*first)
    assert {cache.trim(4) for pair in caches for cache in pair} == {4}
    again = [model(tokens[:, 5:], cache=cache) for cache in caches]
    assert mx.array_equal(*again)
    assert mx.abs(again[0] - first[0][:, 5:]).max().item() < 1e-5
    assert isinstance(caches[1][0], KVCache)
    assert caches[1][0].offset.tolist() == [6, 9]


def test_the_state_continues_elsewhere():
    model, tokens = tiny_model(), random_tokens((1, 9))
    cache, other = model.make_cache(quantized=True), model.make_cache(quantized=True)
    model(tokens[:, :5], cache=cache)
    for old, new in zip(cache, other):
        new.state = old.state
    assert mx.array_equal(model(tokens[:, 5:], cache=other), model(tokens[:, 5:], cache=cache))


def test_a_model_that_does_not_round_has_no_such_cache():
    with pytest.raises(ConfigError, match="8-bit cache"):
        tiny_model(kv_quant=False).make_cache(quantized=True)
    assert isinstance(tiny_model().make_cache(quantized=True)[0], Int8KVCache)
