"""Adapters added and removed while the server runs."""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

import mlx_afm
from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.errors import TensorsError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving import ServeConfig, running
from serving_client import chat, parse_reply, request_bytes, send, wait_for
from tiny import random_adapter

CHAT, ADMIN = "/v1/chat/completions", "/admin/adapters"


def body(model):
    return {"model": model, "messages": chat("list the files"), "max_tokens": 8}


def test_an_adapter_comes_and_goes(server, call, served_adapters, model_folder):
    spare = served_adapters["small"].parent / "spare.pt"
    assert call(server.url, "POST", CHAT, body("spare")).status == 404
    added = call(server.url, "POST", ADMIN, {"name": "spare", "path": str(spare)})
    assert (added.status, added.json["name"]) == (200, "spare")
    try:
        listed = {entry["name"]: entry for entry in call(server.url, "GET", ADMIN).json["adapters"]}
        assert (listed["spare"]["bytes"], listed["spare"]["loaded"]) == (added.json["bytes"], False)
        answer = call(server.url, "POST", CHAT, body("spare")).json["choices"][0]["message"]["content"]
        assert answer == mlx_afm.generate(*mlx_afm.load(model_folder, spare), chat("list the files"), max_tokens=8)
        assert "spare" in [m["id"] for m in call(server.url, "GET", "/v1/models").json["data"]]
        again = call(server.url, "POST", ADMIN, {"name": "spare", "path": str(spare)})
        assert (again.status, again.error["code"]) == (409, "not_added")
    finally:
        assert call(server.url, "DELETE", f"{ADMIN}/spare").json == {"name": "spare", "removed": True}
    assert call(server.url, "POST", CHAT, body("spare")).status == 404
    assert call(server.url, "DELETE", f"{ADMIN}/spare").status == 404


def test_only_from_the_allowed_folders(server, call, served_adapters, tmp_path):
    root = served_adapters["small"].parent
    outside = shutil.copytree(served_adapters["small"], tmp_path / "outside")
    os.symlink(outside, root / "link")
    try:
        for path in (outside, root / "link", root / ".." / outside.name, root, "/", "etc/passwd", ""):
            reply = call(server.url, "POST", ADMIN, {"name": "x", "path": str(path)})
            assert reply.status == (400 if path == "" else 403), path
    finally:
        os.unlink(root / "link")
    assert call(server.url, "POST", ADMIN, {"name": "x", "path": str(root / "none")}).status == 400
    assert "x" not in [m["id"] for m in call(server.url, "GET", "/v1/models").json["data"]]


@pytest.mark.parametrize(
    "value",
    [{}, {"name": "a"}, {"name": "a b", "path": "x"}, {"name": "base", "path": "x"}, {"name": "a", "path": 1},
     {"name": "a", "path": "\0"}, {"name": "a", "path": "x", "more": 1}, {"name": "a" * 200, "path": "x"}, []],
    ids=str,
)  # fmt: skip
def test_wrong_calls(value, server, call):
    assert call(server.url, "POST", ADMIN, value).status in (400, 403)


def test_the_bases_name_is_taken(server, call, served_adapters):
    reply = call(server.url, "POST", ADMIN, {"name": "base", "path": str(served_adapters["small"])})
    assert (reply.status, reply.error["code"]) == (409, "not_added")


def test_a_web_page_cannot(server):
    data = request_bytes("POST", ADMIN, b'{"name": "x", "path": "y"}')
    plain = parse_reply(send(server.url, data.replace(b"application/json", b"text/plain")))
    assert plain.status == 415
    named = parse_reply(send(server.url, data.replace(b"Host: localhost", b"Host: page.example")))
    assert named.status == 403


def test_it_is_off_unless_a_folder_is_allowed(model_folder, served_adapters, call):
    with running(model_folder, {}, ServeConfig(port=0)) as plain:
        for method, path in (("GET", ADMIN), ("POST", ADMIN), ("DELETE", f"{ADMIN}/a")):
            reply = call(plain.url, method, path, {"name": "a", "path": str(served_adapters["small"])})
            assert (reply.status, reply.error["code"]) == (403, "admin_off")


def test_a_path_in_an_ordinary_request_reaches_nothing(server, call, served_adapters):
    for extra in ({"adapters": str(served_adapters["small"])}, {"adapter": "x"}, {"adapter_path": "x"}):
        assert call(server.url, "POST", CHAT, {**body("base"), **extra}).status == 400
    assert call(server.url, "POST", CHAT, body(str(served_adapters["small"]))).status == 404


def test_adapters_take_turns_in_little_memory(model_folder, served_adapters, bytes_in_memory, call, alone):
    """Room for one of them at a time: all are served, and more than one never lies in memory."""
    some = {name: served_adapters[name] for name in ("whole", "small", "dora")}
    sizes = [bytes_in_memory(path) for path in some.values()]
    config = ServeConfig(port=0, model_id="base", adapter_bytes=max(sizes), admin_roots=(model_folder,))
    with running(model_folder, some, config) as tight:
        for name in ("whole", "small", "dora", "whole"):
            reply = call(tight.url, "POST", CHAT, body(name))
            assert reply.json["choices"][0]["message"]["content"] == alone(name, "list the files", max_tokens=8)
            listed = call(tight.url, "GET", ADMIN).json["adapters"]
            assert sum(entry["bytes"] for entry in listed if entry["loaded"]) <= config.adapter_bytes
        loads = {entry["name"]: entry["loads"] for entry in listed}
    assert loads["whole"] == 2


def test_a_request_that_waits_for_an_adapter_which_is_removed(model_folder, served_adapters, call):
    """It is told what it would be told if it came now."""
    root = served_adapters["small"].parent
    config = ServeConfig(port=0, model_id="base", rows=1, admin_roots=(root,))
    with running(model_folder, {"small": served_adapters["small"]}, config) as server, ThreadPoolExecutor() as pool:
        long = {**body("base"), "max_tokens": 400, "logit_bias": {"2": -100, "4": -100}}
        first = pool.submit(call, server.url, "POST", CHAT, long)
        wait_for(lambda: b"mlx_afm_rows 1" in call(server.url, "GET", "/metrics").body)
        waits = pool.submit(call, server.url, "POST", CHAT, body("small"))
        wait_for(lambda: b"mlx_afm_waiting 1" in call(server.url, "GET", "/metrics").body)
        assert call(server.url, "DELETE", f"{ADMIN}/small").status == 200
        reply = waits.result(60)
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert "was removed" in reply.error["message"]
        assert first.result(60).status == 200


def test_adapters_by_vllms_calls(server, call, served_adapters):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    spare = served_adapters["small"].parent / "spare.pt"
    added = call(server.url, "POST", load, {"lora_name": "spare", "lora_path": str(spare)})
    assert (added.status, added.body) == (200, b"Success: LoRA adapter 'spare' added successfully.")
    try:
        cards = {card["id"]: card for card in call(server.url, "GET", "/v1/models").json["data"]}
        assert (cards["spare"]["parent"], cards["base"]["parent"]) == ("base", None)
        assert call(server.url, "POST", CHAT, body("spare")).status == 200
        assert call(server.url, "POST", load, {"lora_name": "spare", "lora_path": str(spare)}).status == 409
    finally:
        assert call(server.url, "POST", unload, {"lora_name": "spare"}).status == 200
    assert call(server.url, "POST", unload, {"lora_name": "spare"}).status == 404
    assert call(server.url, "POST", load, {"lora_name": "x", "lora_path": "/etc/passwd"}).status == 403
    assert call(server.url, "POST", load, {"lora_name": "x"}).error["param"] == "lora_path"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(value, server, call, served_adapters, model_folder):
    folder = served_adapters["small"].parent / "spoiled"
    shutil.copytree(served_adapters["small"], folder)
    data = bytearray((folder / "adapters.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    name = sorted(set(header) - {"__metadata__"})[5]
    place = start + header[name]["data_offsets"][0]
    data[place : place + 4] = struct.pack("<f", value)
    (folder / "adapters.safetensors").write_bytes(data)
    try:
        reply = call(server.url, "POST", ADMIN, {"name": "spoiled", "path": str(folder)})
        assert (reply.status, reply.error["code"]) == (400, "not_added")
        assert "not finite" in reply.error["message"]
        assert name in reply.error["message"]
        with pytest.raises(TensorsError, match="not finite"), running(model_folder, {"a": folder}, ServeConfig(port=0)):
            raise AssertionError
    finally:
        shutil.rmtree(folder)


def test_an_adapter_without_effect_is_served_with_a_warning(model_folder, call, tmp_path, alone):
    fresh = random_adapter(ModelFolder(model_folder).config, LoRAConfig(rank=4))
    for name, tensor in fresh.weights.items():
        if name.endswith(".lora_b"):
            fresh.weights[name] = LazyTensor.of(0 * tensor.read_values())
    write_adapter_folder(tmp_path / "fresh", fresh)
    told = []
    with running(model_folder, {"fresh": tmp_path / "fresh"}, ServeConfig(port=0), told.append) as server:
        reply = call(server.url, "POST", CHAT, body("fresh"))
        assert reply.json["choices"][0]["message"]["content"] == alone("base", "list the files", max_tokens=8)
    (line,) = told
    assert "no effect" in line
