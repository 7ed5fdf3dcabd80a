"""Keys and values kept in memory and in files: the same tokens as without, whatever is shared."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from engine_runs import answer, engine_of, events_of

import mlx_afm
import tolerances
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.safetensors_file import read_metadata, read_safetensors, write_safetensors
from mlx_afm.generation import (
    GenerateConfig,
    PrefixCache,
    PromptCache,
    Request,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_afm.generation.prefix_cache import prefix_owner
from mlx_afm.generation.prompt_cache import fingerprint
from mlx_afm.model.projections import quantize_modules
from mlx_afm.quant import Scheme
from tiny import tiny_model, with_adapter

IDS = np.random.default_rng(3).integers(1, 61, 40).tolist()
CONFIG = GenerateConfig(max_tokens=8)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def events_with(model, ids, known=None, **settings):
    """What the engine gives for a prompt; with caches that begin with its ids, these are taken."""
    prefixes = PrefixCache() if known is not None else None
    config = GenerateConfig(**{"max_tokens": 8, **settings})
    if known is not None:
        prefixes.store(ids[: known[0].size()], known, prefix_owner(kv_bits=config.kv_bits))
    events = events_of(engine_of(model, prefix_cache=prefixes), [Request(ids=ids, config=config)])
    assert known is None or events[0].row.cached_tokens == known[0].size()
    return events


def tokens_with(model, ids, known=None, **settings):
    return [event.token.token for event in events_with(model, ids, known, **settings)]


def cache_of(model, ids, *, quantized=False):
    cache = model.make_cache(quantized=quantized)
    mx.eval(model(mx.array([ids]), cache))
    return cache


def log_softmax(logits):
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int8"])
def test_every_split_of_a_prompt_gives_what_the_whole_gives(model, quantized):
    kv_bits = 8 if quantized else None
    whole = log_softmax(model(mx.array([IDS]))[0, -1])
    expected = tokens_with(model, IDS, kv_bits=kv_bits)
    for split in range(1, len(IDS)):
        events = events_with(model, IDS, cache_of(model, IDS[:split], quantized=quantized), kv_bits=kv_bits)
        assert mx.abs(events[0].logprobs_V - whole).max().item() <= tolerances.SAME_ARITHMETIC
        assert [event.token.token for event in events] == expected


@pytest.mark.parametrize("step_tokens", [1, 7, 39, 40])
def test_prompts_computed_in_pieces(model, step_tokens):
    events = events_with(model, IDS, prefill_step_size=step_tokens)
    whole = log_softmax(model(mx.array([IDS]))[0, -1])
    assert mx.abs(events[0].logprobs_V - whole).max().item() <= tolerances.SAME_ARITHMETIC
    assert [event.token.token for event in events] == tokens_with(model, IDS)


def test_only_the_last_token_goes_through_reusing_layers_and_head(model, monkeypatch):
    """Counted by the rows that are computed: a piece before the last leaves these layers unevaluated."""
    rows = []
    head = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, x: rows.append(x.shape) or head(self, x))
    layer = type(model.model.kv_reuse_layers[0])
    call = layer.__call__
    monkeypatch.setattr(layer, "__call__", lambda self, x, *more: rows.append(x.shape) or call(self, x, *more))
    tokens_with(model, IDS, max_tokens=1)
    assert rows == [(1, 1, 32), (1, 1, 32), (1, 32)]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_saved_cache_is_as_good_as_one_in_memory(model, tmp_path, kv_bits):
    quantized = kv_bits is not None
    file = tmp_path / "kept.safetensors"
    cache = cache_of(model, IDS[:30], quantized=quantized)
    save_prompt_cache(file, PromptCache(IDS[:30], cache), model)
    loaded = load_prompt_cache(file, model, quantized=quantized)
    assert loaded.ids == IDS[:30]
    for kept, found in zip(cache, loaded.layers):
        assert mx.array_equal(kept.keys[..., :30, :], found.keys)
        assert mx.array_equal(kept.values[..., :30, :], found.values)
    expected = tokens_with(model, IDS, kv_bits=kv_bits)
    for known in (30, 17, 1):
        assert tokens_with(model, IDS, loaded.take(known), kv_bits=kv_bits) == expected
    before = file.read_bytes()
    save_prompt_cache(file, loaded, model)
    assert file.read_bytes() == before


def test_bfloat16_goes_through_a_file(tmp_path):
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    cache = cache_of(model, IDS)
    save_prompt_cache(tmp_path / "a.safetensors", PromptCache(IDS, cache), model)
    found = load_prompt_cache(tmp_path / "a.safetensors", model).layers
    assert found[0].keys.dtype == mx.bfloat16
    assert all(mx.array_equal(a.keys[..., :40, :], b.keys) for a, b in zip(cache, found))


def test_files_that_are_not_of_this_model_are_refused(model, tmp_path):
    file = tmp_path / "kept.safetensors"
    save_prompt_cache(file, PromptCache(IDS, cache_of(model, IDS)), model)
    for other in (tiny_model(seed=1), tiny_model(rope_theta=1e4), with_adapter(tiny_model())):
        with pytest.raises(ConfigError, match=r"kept.safetensors: a prompt cache of another model or adapter"):
            load_prompt_cache(file, other)
    with pytest.raises(ConfigError, match=r"of the other kind .found the dtype of the model"):
        load_prompt_cache(file, model, quantized=True)
    with pytest.raises(FormatError, match="no such file"):
        load_prompt_cache(tmp_path / "none.safetensors", model)
    with pytest.raises(ConfigError, match=r"expected .safetensors at its end"):
        save_prompt_cache(tmp_path / "kept.npz", PromptCache(IDS, cache_of(model, IDS)), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.safetensors"]


@pytest.mark.parametrize("change", ["format", "ids", "missing", "shape", "one token less"])
def test_damaged_files_are_refused(model, tmp_path, change):
    file = tmp_path / "kept.safetensors"
    save_prompt_cache(file, PromptCache(IDS, cache_of(model, IDS)), model)
    metadata, tensors = read_metadata(file), read_safetensors(file)
    if change == "format":
        metadata = {"format": "another"}
    elif change == "ids":
        del tensors["ids"]
    elif change == "missing":
        del tensors["values.2"]
    elif change == "one token less":
        other = tmp_path / "short.safetensors"
        save_prompt_cache(other, PromptCache(IDS[:-1], cache_of(model, IDS[:-1])), model)
        tensors["keys.1"] = read_safetensors(other)["keys.1"]
    else:
        tensors["keys.1"] = tensors["ids"]
    write_safetensors(tmp_path / "bad.safetensors", tensors, metadata=metadata)
    with pytest.raises(FormatError, match=r"bad.safetensors: (not a prompt cache|a prompt cache without|wrong)"):
        load_prompt_cache(tmp_path / "bad.safetensors", model)


def test_a_fingerprint_tells_models_apart(model):
    changed = tiny_model()
    changed.model.layers[0].mlp.up_proj.weight[3] += 1e-3
    adapted, scaled = with_adapter(tiny_model()), with_adapter(tiny_model())
    for module in scaled.modules():
        if "lora_a" in module:
            module.scale = 0.25
    quantized = tiny_model()
    quantize_modules(quantized, {"model.layers.0.self_attn.out_proj": Scheme(bits=8, group_size=32)}, mx.float32)
    prints = [fingerprint(each) for each in (model, changed, adapted, scaled, quantized)]
    assert len(set(prints)) == 5
    assert fingerprint(tiny_model()) == prints[0]


def test_prompts_that_begin_alike_share_exactly_that(model):
    prefixes = PrefixCache()
    assert prefixes.fetch(IDS) is None
    cache = cache_of(model, IDS)
    prefixes.store(IDS, cache)
    for length in (1, 12, 39):
        other = [*IDS[:length], *(60 - token for token in IDS[length : length + 5])]
        found, known = prefixes.fetch(other)
        assert known == length
        assert [layer.size() for layer in found] == [length] * 3
        assert tokens_with(model, other, found) == tokens_with(model, other) == answer(model, other, CONFIG)
    assert prefixes.fetch(IDS)[1] == 39
    assert prefixes.fetch(IDS[:9])[1] == 8
    assert prefixes.fetch([60 - IDS[0], *IDS]) is None
    assert prefixes.fetch(IDS[:1]) is None
    assert mx.array_equal(prefixes.newest().layers[0].keys[..., :40, :], cache[0].keys[..., :40, :])


def test_what_was_of_use_longest_ago_goes_first(model):
    prefixes, cache = PrefixCache(max_tokens=25), cache_of(model, IDS)
    starts = [IDS[index : index + 10] for index in (0, 11, 22)]
    for ids in starts[:2]:
        prefixes.store(ids, cache)
    assert prefixes.tokens == 20
    assert prefixes.fetch([*starts[0], 1]) is not None
    prefixes.store(starts[2], cache)
    assert prefixes.fetch([*starts[1], 1]) is None
    assert prefixes.fetch([*starts[0], 1]) is not None
    prefixes.store(IDS, cache)
    assert prefixes.tokens == 20
    prefixes.store(IDS[:12], cache)
    assert prefixes.tokens == 22  # in place of what it begins with
    prefixes.store(IDS[:5], cache)
    assert prefixes.tokens == 22  # known already


def test_owners_know_nothing_of_each_other(model):
    prefixes, cache = PrefixCache(max_tokens=90), cache_of(model, IDS)
    prefixes.store(IDS, cache, "one")
    prefixes.store(IDS, cache, "two")
    assert prefixes.fetch(IDS) is None
    assert prefixes.fetch(IDS, "one")[1] == 39
    prefixes.store(IDS[:20], cache, "three")
    assert prefixes.fetch(IDS, "two") is None  # of use longest ago
    assert prefixes.fetch(IDS, "one")[1] == 39
    prefixes.clear("one")
    assert prefixes.fetch(IDS, "one") is None
    assert prefixes.tokens == 20


def test_streaming_uses_and_fills_a_prefix_cache(model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    prefixes, told = PrefixCache(), []
    texts = ["copy vome.go to zasu.txt", "copy vome.go to zasu.go", "sort vido.conf in reverse"]
    for text in texts:
        plain = mlx_afm.generate(model, tokenizer, text, max_tokens=20)
        options = {"max_tokens": 20, "prefix_cache": prefixes, "on_progress": lambda _, total: told.append(total)}
        assert mlx_afm.generate(model, tokenizer, text, **options) == plain
    lengths = [len(mlx_afm.generation.to_prompt_ids(tokenizer, text)) for text in texts]
    assert told[0] == lengths[0]
    assert all(computed < length for computed, length in zip(told[1:], lengths[1:]))
    abandoned = mlx_afm.stream_generate(
        model, tokenizer, "list the files in docs", max_tokens=20, prefix_cache=prefixes
    )
    next(abandoned)
    abandoned.close()
    assert prefixes.newest(prefix_owner()).ids == mlx_afm.generation.to_prompt_ids(tokenizer, "list the files in docs")
