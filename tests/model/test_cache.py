"""The cache: left padding, masks, mlx-lm's own caches in our model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import tolerances
from mlx_afm.model import KVCache
from tiny import random_tokens, tiny_model

LENGTHS = [3, 7, 1, 5]


def padded_batch() -> tuple[list[mx.array], mx.array, list[int]]:
    rows = [random_tokens((length,), seed=length) for length in LENGTHS]
    padding = [max(LENGTHS) - length for length in LENGTHS]
    tokens = mx.stack([mx.concatenate([mx.zeros((pad,), mx.int32), row]) for pad, row in zip(padding, rows)])
    return rows, tokens, padding


def caches_of(kind: str, model, padding: list[int]):
    if kind == "ours":
        return model.make_cache(left_padding=padding)
    from mlx_lm.models.cache import BatchKVCache

    return [BatchKVCache(padding) for _ in model.model.layers]


@pytest.mark.parametrize("kind", ["ours", "mlx-lm"])
def test_unequal_prompts_in_a_batch_equal_single_prompts(kind):
    """mlx-lm's own afm7 fails this: its reuse layers rotate queries as if there were no padding."""
    model = tiny_model()
    rows, tokens, padding = padded_batch()
    caches = caches_of(kind, model, padding)
    logits = model(tokens, cache=caches)
    following = random_tokens((len(rows), 2), seed=8)
    later = model(following, cache=caches)
    for index, row in enumerate(rows):
        alone = model(mx.concatenate([row, following[index]])[None])[0]
        together = mx.concatenate([logits[index, padding[index] :], later[index]])
        assert mx.abs(alone - together).max().item() <= tolerances.SAME_ARITHMETIC


def test_needed_positions_in_a_padded_batch():
    model = tiny_model()
    rows, tokens, padding = padded_batch()
    whole = model.hidden(tokens, cache=model.make_cache(padding))
    last = mx.full((len(rows), 1), tokens.shape[1] - 1)
    only = model.hidden(tokens, cache=model.make_cache(padding), output_positions=last)
    assert mx.abs(only - whole[:, -1:]).max().item() <= tolerances.SAME_ARITHMETIC


def test_padding_sees_itself_alone_and_nothing_sees_it():
    cache = KVCache([2, 0])
    mask = np.array(cache.make_mask(3))[:, 0]
    assert mask[0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]
    assert mask[1].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert cache.offset.tolist() == [-2, 0]


def test_masks_without_padding_are_left_to_the_kernel():
    cache = KVCache()
    assert cache.make_mask(1) is None
    assert cache.make_mask(4) == "causal"
    assert cache.make_mask(2, return_array=True).tolist() == [[[[True, False], [True, True]]]]
    assert KVCache([0, 0]).left_padding is None


def test_state_sizes_and_trimming():
    cache = KVCache()
    assert (cache.empty(), cache.nbytes, cache.size(), cache.is_trimmable()) == (True, 0, 0, True)
    keys = mx.ones((1, 2, 5, 4))
    cache.update_and_fetch(keys, keys)
    assert (cache.empty(), cache.size(), cache.offset) == (False, 5, 5)
    assert cache.nbytes == 2 * 256 * 2 * 4 * 4
    other = KVCache()
    other.state = cache.state
    assert cache.trim(9) == 5
    assert (cache.size(), other.size()) == (0, 5)
