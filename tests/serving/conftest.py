"""A server on the bundled model with four adapters of different form, in threads of this process."""

import json

import pytest

import mlx_afm
from mlx_afm.adapters import LoRAConfig, write_adapter_folder, write_adapter_package, write_adapter_pt
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving import ServeConfig, running
from mlx_afm.serving.pool import AdapterPool
from serving_client import chat, parse_reply, request_bytes, send
from tiny import random_adapter


@pytest.fixture(scope="session")
def served_adapters(model_folder, tmp_path_factory):
    """Adapters by name: all projections as a package; rank 4; three projections of some layers; DoRA."""
    folder, base = tmp_path_factory.mktemp("served"), ModelFolder(model_folder).config
    whole, small = random_adapter(base, seed=3), random_adapter(base, LoRAConfig(rank=4, scale=2.0), seed=4)
    some = random_adapter(base, LoRAConfig(rank=8, targets=("q", "v", "down"), layers="1-4"), seed=5)
    dora = random_adapter(base, LoRAConfig(rank=4, fine_tune_type="dora"), seed=6)
    for name, adapter in (("small", small), ("some", some), ("dora", dora)):
        write_adapter_folder(folder / name, adapter)
    write_adapter_pt(folder / "spare.pt", random_adapter(base, seed=7))
    package = write_adapter_package(folder / "whole.fmadapter", whole, Metadata(name="whole", rank=32))
    return {"whole": package, **{name: folder / name for name in ("small", "some", "dora")}}


@pytest.fixture(scope="session")
def bytes_in_memory(model_folder):
    """A function that gives the bytes of an adapter in its inference form, from the shapes in its file."""
    pool = AdapterPool(ModelFolder(model_folder).load_model(), ModelFolder(model_folder), 10**9)

    def look(path):
        name = str(len(pool.names))
        return pool.register(name, path).size_bytes

    return look


@pytest.fixture(scope="session")
def alone(model_folder, served_adapters):
    """A function that gives what one user alone gets: the text of `generate`, by adapter and request."""
    models, answers = {}, {}

    def ask(adapter, text, **settings):
        key = (adapter, text, json.dumps(settings))
        if adapter not in models:
            models[adapter] = mlx_afm.load(model_folder, served_adapters.get(adapter))
        if key not in answers:
            answers[key] = mlx_afm.generate(*models[adapter], chat(text), **settings)
        return answers[key]

    return ask


@pytest.fixture(scope="session")
def serve_config(served_adapters):
    return ServeConfig(
        port=0,
        model_id="base",
        header_seconds=1.0,
        body_seconds=1.0,
        queue=64,
        connections=64,
        admin_roots=(served_adapters["small"].parent,),
    )


@pytest.fixture(scope="session")
def server(model_folder, served_adapters, serve_config):
    problems = []
    with running(model_folder, served_adapters, serve_config, problems.append) as started:
        yield started
    assert problems == []


@pytest.fixture
def call():
    """A function that makes one request and gives the reply."""

    def make(url, method, path, value=None, headers=()):
        body = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        return parse_reply(send(url, request_bytes(method, path, body, headers)))

    return make
