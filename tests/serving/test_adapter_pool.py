"""Adapters over one base: each gives what it gives when it is loaded alone, and the base is there once."""

import dataclasses
import gc

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm.adapters import LoRAConfig, is_zero, write_adapter_folder
from mlx_afm.errors import AdapterError, FormatError
from mlx_afm.generation import Engine, Request
from mlx_afm.model import backend
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving.pool import AdapterPool
from tiny import random_adapter, random_tokens

TOKENS = random_tokens((1, 9), vocab=512)
IDS = TOKENS[0].tolist()


def pool_over(model_folder, limit_bytes=10**9, adapters=None):
    model = ModelFolder(model_folder).load_model()
    mx.eval(model.parameters())
    pool = AdapterPool(model, ModelFolder(model_folder), limit_bytes)
    for name, path in (adapters or {}).items():
        pool.register(name, path)
    return pool


def logits_of(pool, name):
    decoder = pool.acquire(name)
    routes = pool.routes_of(decoder)([pool.routed_name(name)])
    logits = decoder.prefill(TOKENS, decoder.form.model.make_cache(), routes)
    mx.eval(logits)
    pool.release(name)
    return logits


@pytest.fixture
def served(model_folder, served_adapters):
    """A pool with all four adapters in memory."""
    pool = pool_over(model_folder, adapters=served_adapters)
    for name in served_adapters:
        pool.acquire(name)
        pool.release(name)
    return pool


def distance(a, b):
    return mx.max(mx.abs(a - b)).item()


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_each_adapter_gives_what_it_gives_alone(model_folder, served_adapters, monkeypatch, device):
    if device != "cpu":
        monkeypatch.setattr(backend, "on_cpu", lambda: False)
    pool = pool_over(model_folder, adapters=served_adapters)
    alone = {name: mlx_afm.load(model_folder, path)[0] for name, path in {**served_adapters, None: None}.items()}
    for name in [*served_adapters, None, "small", "dora", None]:
        assert distance(logits_of(pool, name), alone[name].next_logits(TOKENS)) < 2e-4
    assert mx.array_equal(logits_of(pool, "small"), logits_of(pool, "small")).item()
    assert distance(logits_of(pool, "small"), logits_of(pool, None)) > 0.1


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_the_base_is_there_once(model_folder, served_adapters, monkeypatch, device):
    if device != "cpu":
        monkeypatch.setattr(backend, "on_cpu", lambda: False)
    pool = pool_over(model_folder, adapters=served_adapters)
    logits_of(pool, None)
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    for name in served_adapters:
        logits_of(pool, name)
    mx.clear_cache()
    gc.collect()
    grown = mx.get_active_memory() - before
    expected = sum(entry["bytes"] for entry in pool.state())
    assert pool.held_bytes == expected
    assert expected <= grown <= 1.1 * expected


def test_all_adapters_of_a_batch_take_one_pass_a_token(model_folder, served_adapters):
    """One engine; rows of three LoRA adapters and of the base."""
    names = ["whole", None, "small", "some", "whole", None]
    pool = pool_over(model_folder, adapters=served_adapters)
    for name in names:
        assert pool.acquire(name) is pool.decoder
    engine = Engine(pool.decoder, routes=pool.routes_of(pool.decoder), batch_size=8)
    rows = [engine.add(Request(ids=IDS, adapter=name, max_tokens=12))[0] for name in names]
    while engine.busy:
        engine.step()
    assert pool.decoder.counters.plain_steps == 11
    for row, name in zip(rows, names):
        model, _ = mlx_afm.load(model_folder, served_adapters.get(name))
        ids = list(IDS)
        for token in row.tokens:
            assert token == mx.argmax(model.next_logits(mx.array([ids]))).item()
            ids.append(token)


def test_removing_gives_the_memory_back(served, request):
    logits_of(served, "small")
    limit = mx.set_cache_limit(0)  # else arrays lie in kept buffers that are up to two pages larger
    request.addfinalizer(lambda: mx.set_cache_limit(limit))
    for name in ("small", "dora"):
        gc.collect()  # what other tests left behind is not to go meanwhile
        before, held = mx.get_active_memory(), served.held_bytes
        size = {entry["name"]: entry["bytes"] for entry in served.state()}[name]
        assert served.unregister(name)
        gc.collect()
        assert held - served.held_bytes == size
        assert before - mx.get_active_memory() >= 0.95 * size
    with pytest.raises(AdapterError, match="was removed"):
        served.acquire("small")


def test_a_compiled_step_holds_no_adapter_that_was_removed(model_folder, served_adapters):
    """The memory comes back, and the step sees the stacks as they are now."""
    pool = pool_over(model_folder, adapters={name: served_adapters[name] for name in ("whole", "small")})
    pool.decoder.compiled, pool.decoder.plain_steps = True, 1

    def answer(*names):
        engine = Engine(pool.decoder, routes=pool.routes_of(pool.decoder))
        rows = [engine.add(Request(ids=IDS, adapter=name, max_tokens=8))[0] for name in names]
        while engine.busy:
            engine.step()
        return [row.tokens for row in rows]

    pool.acquire("whole")
    pool.acquire("small")
    wanted, both = answer("small"), answer("whole", "small")
    assert both[1] == wanted[0] != both[0]
    gc.collect()
    before, size = mx.get_active_memory(), {entry["name"]: entry["bytes"] for entry in pool.state()}["whole"]
    pool.release("whole")
    assert pool.unregister("whole")
    gc.collect()
    assert before - mx.get_active_memory() >= 0.95 * size
    assert answer("small") == wanted
    assert pool.decoder.counters.compiled_steps > 10


def test_dropout_of_training_is_off(model_folder, tmp_path):
    base = ModelFolder(model_folder).config
    for kind in ("lora", "dora"):
        config = LoRAConfig(rank=4, dropout=0.5, fine_tune_type=kind)
        write_adapter_folder(tmp_path / kind, random_adapter(base, config))
        pool = pool_over(model_folder, adapters={"a": tmp_path / kind})
        assert mx.array_equal(logits_of(pool, "a"), logits_of(pool, "a")).item()


def test_the_bases_own_adapter_is_the_bases_and_no_others(toolkit_folder, model_folder, tmp_path):
    """A base that carries an adapter: rows of the base have it, rows of other adapters have theirs instead."""
    base = ModelFolder(model_folder).config
    own, other = random_adapter(base, seed=8), random_adapter(base, LoRAConfig(rank=4), seed=9)
    assert not is_zero(own)
    write_adapter_folder(tmp_path / "own", own)
    write_adapter_folder(tmp_path / "other", other)
    model = ModelFolder(model_folder).load_model()
    pool = AdapterPool(model, ModelFolder(model_folder), 10**9, own=own)
    pool.register("other", tmp_path / "other")
    for name, path in ((None, "own"), ("other", "other")):
        alone, _ = mlx_afm.load(model_folder, tmp_path / path)
        assert distance(logits_of(pool, name), alone.next_logits(TOKENS)) < 2e-4
    assert ModelFolder(model_folder).base_adapter is None or is_zero(ModelFolder(model_folder).base_adapter)
    assert [entry["name"] for entry in pool.state()] == ["other"]
    assert pool.held_bytes == pool.state()[0]["bytes"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_file_that_cannot_be_read_to_its_end_leaves_the_others_alone(model_folder, tmp_path, monkeypatch, kind):
    """The LoRA adapters have one rank and the same projections, so that their matrices share stacks."""
    base = ModelFolder(model_folder).config
    for name, form in (("good", "lora"), ("bad", kind)):
        write_adapter_folder(tmp_path / name, random_adapter(base, LoRAConfig(rank=4, fine_tune_type=form)))
    pool = pool_over(model_folder, adapters={name: tmp_path / name for name in ("good", "bad")})
    wanted, plain, held = logits_of(pool, "good"), logits_of(pool, None), pool.held_bytes

    def refuse():
        raise FormatError("the file ends too early")

    open_whole = ModelFolder.open_adapter

    def open_damaged(folder, path):
        adapter = open_whole(folder, path)
        name = list(adapter.weights)[len(adapter.weights) // 2]
        damaged = dataclasses.replace(adapter.weights[name], read_stored=refuse)
        return dataclasses.replace(adapter, weights={**adapter.weights, name: damaged})

    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "open_adapter", open_damaged)
        with pytest.raises(FormatError, match="ends too early"):
            pool.acquire("bad")
    assert mx.array_equal(logits_of(pool, "good"), wanted).item()
    assert mx.array_equal(logits_of(pool, None), plain).item()
    assert pool.held_bytes == held
    alone, _ = mlx_afm.load(model_folder, tmp_path / "bad")
    assert distance(logits_of(pool, "bad"), alone.next_logits(TOKENS)) < 2e-4
    assert mx.array_equal(logits_of(pool, "good"), wanted).item()


@pytest.fixture
def pool(model_folder, tmp_path, bytes_in_memory):
    """Five adapters of one size, of which two fit."""
    base = ModelFolder(model_folder).config
    for number in range(5):
        write_adapter_folder(tmp_path / f"a{number}", random_adapter(base, LoRAConfig(rank=2), seed=number))
    adapters = {f"a{number}": tmp_path / f"a{number}" for number in range(5)}
    return pool_over(model_folder, int(2.5 * bytes_in_memory(tmp_path / "a0")), adapters)


def loaded(pool):
    return {entry["name"] for entry in pool.state() if entry["loaded"]}


def test_the_least_recently_used_leaves_and_never_one_in_use(pool):
    assert loaded(pool) == set()
    assert pool.acquire("a0")
    assert pool.acquire("a1")
    pool.release("a0")
    pool.release("a1")
    assert pool.acquire("a0")
    assert pool.acquire("a2")
    assert loaded(pool) == {"a0", "a2"}  # a1 was used longer ago
    assert not pool.acquire("a3")  # both are in use
    assert loaded(pool) == {"a0", "a2"}
    pool.release("a0")
    assert pool.acquire("a3")
    assert loaded(pool) == {"a2", "a3"}
    assert pool.held_bytes <= pool.limit_bytes


def test_an_adapter_that_is_removed_stays_until_its_last_answer_ends(pool):
    assert pool.acquire("a0")
    assert pool.unregister("a0")
    assert "a0" not in pool.names
    with pytest.raises(AdapterError, match="was removed"):
        pool.acquire("a0")
    assert pool.held_bytes > 0
    pool.release("a0")
    assert pool.held_bytes == 0
    assert not pool.unregister("a0")


def test_what_cannot_be_served_is_not_registered(pool, model_folder, other_adapter, tmp_path):
    with pytest.raises(AdapterError, match="of this name"):
        pool.register("a1", tmp_path / "a1")
    with pytest.raises(AdapterError, match="another base model"):
        pool.register("other", other_adapter)
    with pytest.raises((AdapterError, FormatError), match="no adapter here"):
        pool.register("none", tmp_path)
    write_adapter_folder(tmp_path / "large", random_adapter(ModelFolder(model_folder).config, LoRAConfig(rank=64)))
    with pytest.raises(AdapterError, match="larger than the memory for all"):
        pool.register("large", tmp_path / "large")
    write_adapter_folder(
        tmp_path / "full", random_adapter(ModelFolder(model_folder).config, LoRAConfig(fine_tune_type="full"))
    )
    with pytest.raises(AdapterError, match="only low-rank"):
        pool.register("full", tmp_path / "full")
    assert pool.names == ("a0", "a1", "a2", "a3", "a4")


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_sizes_are_known_before_anything_is_read(model_folder, tmp_path, monkeypatch, device):
    if device != "cpu":
        monkeypatch.setattr(backend, "on_cpu", lambda: False)
    base = ModelFolder(model_folder).config
    for kind in ("lora", "dora"):
        for number, targets in enumerate((("q", "down"), ("k", "v", "gate"), ("gate", "up", "o"))):
            config = LoRAConfig(rank=3, targets=targets, fine_tune_type=kind)
            write_adapter_folder(tmp_path / f"{kind}{number}", random_adapter(base, config, seed=number))
            pool = pool_over(model_folder)
            told = pool.register("a", tmp_path / f"{kind}{number}").size_bytes
            assert pool.acquire("a")
            assert pool.held_bytes == told > 0
            decoder = pool.acquire("a")
            arrays = dict(tree_flatten(decoder.form.model.parameters()))
            own = [array for name, array in arrays.items() if name.endswith((".lora_a", ".lora_b", ".factor"))]
            for window in pool.routes_of(decoder)(["a"]):
                own += [array for a, b, _ in window.values() for array in (a, b)]
            assert sum(array.nbytes for array in own) == told
