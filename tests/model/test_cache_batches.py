"""Rows that join and leave a cache keep what they hold, in both kinds of cache, and mlx-lm's batches drive them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
import tolerances
from mlx_afm.errors import ConfigError
from mlx_afm.model import KVCache
from tiny import random_tokens, tiny_model

LENGTHS = (5, 9, 2, 7)
KINDS = pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int8"])


def singles(model, quantized):
    """Each row's own caches, and its tokens."""
    rows = [random_tokens((1, length), seed=length) for length in LENGTHS]
    caches = [model.make_cache(quantized=quantized) for _ in rows]
    for row, cache in zip(rows, caches):
        mx.eval(model(row, cache=cache))
    return rows, caches


def require_rows(model, cache, rows, quantized):
    """A further token of each row gives what the row alone gives with it."""
    following = random_tokens((len(rows), 1), seed=9)
    together = model(following, cache=cache)
    for index, row in enumerate(rows):
        whole = mx.concatenate([row, following[index : index + 1]], axis=1)
        alone = model(whole, cache=model.make_cache(quantized=quantized))
        assert mx.abs(together[index, -1] - alone[0, -1]).max().item() <= tolerances.SAME_ARITHMETIC


@KINDS
def test_merging_rows_of_unequal_length(quantized):
    model = tiny_model()
    rows, caches = singles(model, quantized)
    before = [np.array(cache[0].keys) for cache in caches]
    merged = [layer[0].merge(layer) for layer in zip(*caches)]
    assert {type(layer) for layer in merged} == {type(caches[0][0])}
    assert merged[0].offset.tolist() == list(LENGTHS)
    require_rows(model, merged, rows, quantized)
    assert all(np.array_equal(old, np.array(cache[0].keys)) for old, cache in zip(before, caches))


@KINDS
@pytest.mark.parametrize("kept", [[1], [0, 2], [2, 0], [0, 1, 2, 3], [3, 3, 1]], ids=str)
def test_filtering_rows_drops_padding_that_nobody_needs(quantized, kept):
    model = tiny_model()
    rows, caches = singles(model, quantized)
    merged = [layer[0].merge(layer) for layer in zip(*caches)]
    for index, layer in enumerate(merged):
        layer.filter(kept if index else mx.array(kept))
    assert merged[0].size() == max(LENGTHS[row] for row in kept)
    require_rows(model, merged, [rows[row] for row in kept], quantized)


@KINDS
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["longer joins", "shorter joins"])
def test_extending_by_rows(quantized, order):
    model = tiny_model()
    rows, caches = singles(model, quantized)
    parts = [
        [layer[0].merge(layer) for layer in zip(*caches[:2])],
        [layer[0].merge(layer) for layer in zip(*caches[2:])],
    ]
    parts, rows = [parts[index] for index in order], [row for index in order for row in rows[2 * index : 2 * index + 2]]
    for layer, other in zip(*parts):
        layer.extend(other)
    require_rows(model, parts[0], rows, quantized)
    for index, row in enumerate(rows):
        single = [layer.extract(index) for layer in parts[0]]
        assert single[0].offset == row.shape[1] + 1


@KINDS
def test_rows_of_equal_length_have_no_padding_and_no_mask(quantized):
    model = tiny_model()
    cache = model.make_cache(quantized=quantized)
    mx.eval(model(random_tokens((1, 6)), cache=cache))
    merged = cache[0].merge([cache[0], cache[0]])
    assert merged.left_padding is None
    assert merged.make_mask(1) is None


@KINDS
def test_a_copy_and_its_origin_go_their_own_ways(quantized):
    model = tiny_model()
    (row, *_), (cache, *_) = singles(model, quantized)
    copies = [layer.copy() for layer in cache]
    shorter = [layer.copy(3) for layer in cache]
    mx.eval(model(random_tokens((1, 4), seed=77), cache=cache))
    require_rows(model, copies, [row], quantized)
    require_rows(model, shorter, [row[:, :3]], quantized)
    assert (cache[0].size(), copies[0].size(), shorter[0].size()) == (9, 6, 4)
    assert KVCache([2, 0]).copy().left_padding.tolist() == [2, 0]


def test_caches_without_tokens():
    one, other = KVCache([2, 0]), KVCache([1, 3])
    one.extend(other)
    assert one.left_padding.tolist() == [2, 0, 1, 3]
    one.filter([0, 3])
    assert one.left_padding.tolist() == [2, 3]
    full = KVCache()
    full.update_and_fetch(mx.ones((1, 2, 5, 4)), mx.ones((1, 2, 5, 4)))
    with pytest.raises(ConfigError, match="with tokens and caches without"):
        KVCache.merge([full, KVCache()])
    with pytest.raises(ConfigError, match="by their padding alone"):
        KVCache([1, 0]).extend(KVCache())
    with pytest.raises(ConfigError, match="before the first token"):
        full.prepare(left_padding=[1])
    assert KVCache.merge([KVCache(), KVCache()]).empty()


@KINDS
def test_padding_on_the_right_moves_to_the_left(quantized):
    model = tiny_model()
    rows = [random_tokens((1, length), seed=length) for length in LENGTHS]
    longest = max(LENGTHS)
    tokens = mx.concatenate([mx.pad(row, [(0, 0), (0, longest - row.shape[1])]) for row in rows])
    cache = model.make_cache(quantized=quantized)
    padding = [longest - length for length in LENGTHS]
    for layer in cache:
        layer.prepare(lengths=list(LENGTHS), right_padding=padding)
    mx.eval(model(tokens, cache=cache))
    for layer in cache:
        layer.finalize()
    assert cache[0].left_padding.tolist() == padding
    require_rows(model, cache, rows, quantized)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_mlx_lms_batch_generator_drives_our_model_and_caches(model_folder):
    from mlx_lm.generate import batch_generate
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    model, tokenizer = mlx_afm.load(model_folder)
    texts = ["copy vome.go to zasu.txt", "hi", "sort vido.conf in reverse " * 3, "list the files in docs"]
    prompts = [mlx_afm.generation.to_prompt_ids(tokenizer, text) for text in texts]
    found = batch_generate(model, TokenizerWrapper(tokenizer), prompts, max_tokens=20).texts
    assert found == [mlx_afm.generate(model, tokenizer, ids, max_tokens=20) for ids in prompts]
