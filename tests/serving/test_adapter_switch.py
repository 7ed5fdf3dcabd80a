"""Adapters over one base: each gives what it gives when it is loaded alone, and the base is there once."""

import gc

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm.adapters import LoRAConfig, read_adapter, write_adapter_folder
from mlx_afm.adapters.attach import adapter_weights
from mlx_afm.checkpoints.model_folder import read_config
from mlx_afm.errors import AdapterError, FormatError
from mlx_afm.serving import AdapterSwitch
from mlx_afm.serving.pool import AdapterPool, size_bytes
from tiny import random_adapter, random_tokens, tiny_model, with_adapter

TOKENS = random_tokens((2, 9), vocab=512)


@pytest.fixture
def switch(model_folder, served_adapters):
    model, _ = mlx_afm.load(model_folder)
    made = AdapterSwitch(model)
    for name, path in served_adapters.items():
        made.add(name, read_adapter(path, model.args), where=path)
    return made


def same(a, b):
    return mx.array_equal(a, b).item()


def test_each_adapter_gives_what_it_gives_alone(switch, model_folder, served_adapters):
    for name in [*served_adapters, None, "small", "dora", None]:
        switch.use(name)
        assert switch.active == name
        alone, _ = mlx_afm.load(model_folder, None if name is None else served_adapters[name])
        assert same(switch.model(TOKENS), alone(TOKENS))


def test_the_base_is_there_once(switch, model_folder, served_adapters):
    switch.use(None)
    base = {id(array) for _, array in tree_flatten(switch.model.parameters())}
    for name in served_adapters:
        switch.use(name)
        own = adapter_weights(switch.model)
        others = {id(array) for _, array in tree_flatten(switch.model.parameters())} - {id(a) for a in own.values()}
        assert others == base
        assert switch.sizes[name] >= sum(array.nbytes for array in own.values())
        assert switch.sizes[name] == size_bytes(read_adapter(served_adapters[name], switch.model.args))


def test_removing_gives_the_memory_back(switch):
    switch.use("small")
    mx.eval(switch.model(TOKENS))
    gc.collect()  # what other tests left behind is not to go meanwhile
    before = mx.get_active_memory()
    size = switch.sizes["small"]
    switch.remove("small")
    assert switch.active is None
    assert "small" not in switch
    assert before - mx.get_active_memory() >= 0.95 * size
    with pytest.raises(AdapterError, match="no such adapter"):
        switch.use("small")


def test_dropout_of_training_is_off(model_folder):
    model, _ = mlx_afm.load(model_folder)
    switch = AdapterSwitch(model)
    switch.add("a", random_adapter(model.args, LoRAConfig(rank=4, dropout=0.5)), where="a")
    switch.use("a")
    assert same(model(TOKENS), model(TOKENS))


def test_what_does_not_fit_leaves_the_model_as_it_was(switch, other_adapter):
    before = switch.model(TOKENS)
    full = random_adapter(switch.model.args, LoRAConfig(fine_tune_type="full"))
    wrong = read_adapter(other_adapter)
    for name, adapter in (("full", full), ("wrong", wrong), ("small", full)):
        with pytest.raises(Exception, match=r"only low-rank|tensors|of this name|expected"):
            switch.add(name, adapter, where=name)
        assert switch.active is None
        assert same(switch.model(TOKENS), before)
    with pytest.raises(AdapterError, match="has an adapter already"):
        AdapterSwitch(with_adapter(tiny_model()))


@pytest.fixture
def pool(model_folder, tmp_path):
    """Five adapters of one size, of which two fit."""
    model, _ = mlx_afm.load(model_folder)
    base = read_config(model_folder)
    for number in range(5):
        write_adapter_folder(tmp_path / f"a{number}", random_adapter(base, LoRAConfig(rank=2), seed=number))
    size = size_bytes(read_adapter(tmp_path / "a0", base))
    made = AdapterPool(AdapterSwitch(model), model_folder, int(2.5 * size))
    for number in range(5):
        made.register(f"a{number}", tmp_path / f"a{number}")
    return made


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
    write_adapter_folder(tmp_path / "large", random_adapter(read_config(model_folder), LoRAConfig(rank=64)))
    with pytest.raises(AdapterError, match="larger than the memory for all"):
        pool.register("large", tmp_path / "large")
    write_adapter_folder(
        tmp_path / "full", random_adapter(read_config(model_folder), LoRAConfig(fine_tune_type="full"))
    )
    with pytest.raises(AdapterError, match="only low-rank"):
        pool.register("full", tmp_path / "full")
    assert pool.names == ("a0", "a1", "a2", "a3", "a4")
