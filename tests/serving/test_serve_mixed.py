"""Rows with different adapters in one batch: right answers, one forward pass a token, adapters that come and go."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.generation.decode import PLAIN_STEPS, SWITCH
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving import ServeConfig, running
from serving_client import REQUESTS, chat, gauge, request_bytes
from tiny import random_adapter

CHAT, ADMIN = "/v1/chat/completions", "/admin/adapters"
NO_END = {"2": -100, "4": -100}
RANKS = (4, 16, 32, 64)
NAMES = ("base", *(f"rank{rank}" for rank in RANKS))


@pytest.fixture(scope="module")
def ranked(model_folder, served_adapters):
    """Adapters of ranks 4 to 64 on different projections; their names are new, so that `alone` can look them up."""
    folder, base = served_adapters["small"].parent.parent, ModelFolder(model_folder).config
    targets = {4: ("q", "v"), 16: ("q", "k", "v", "o", "gate", "up", "down"), 32: ("o", "down"), 64: ("gate", "q")}
    paths = {}
    for rank in RANKS:
        paths[f"rank{rank}"] = folder / "ranked" / f"rank{rank}"
        config = LoRAConfig(rank=rank, scale=1.0, targets=targets[rank])
        write_adapter_folder(paths[f"rank{rank}"], random_adapter(base, config, seed=rank))
    served_adapters |= paths
    yield paths
    for name in paths:
        del served_adapters[name]


def metrics(call, url):
    return call(url, "GET", "/metrics").body.decode()


def steps(call, url):
    text = metrics(call, url)
    return [gauge(text, f"{kind}_steps_total") for kind in ("plain", "compiled")]


def body(model, text=REQUESTS[0], **settings):
    return {"model": model, "messages": chat(text), "max_tokens": 40, **settings}


def open_stream(url, value):
    """A connection on which an answer has begun, and what came so far."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(request_bytes("POST", CHAT, json.dumps({**value, "stream": True}).encode()))
    received = b""
    while received.count(b"data: ") < 2:
        received += connection.recv(1 << 16)
    return connection, received


def text_of(connection, received):
    """The rest of a stream, as text."""
    while piece := connection.recv(1 << 16):
        received += piece
    connection.close()
    lines = [line for line in received.decode().splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all("error" not in event for event in events), events
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def ask_together(url, asked):
    """Opens all streams before one is read to its end; the texts."""
    opened = [open_stream(url, value) for value in asked]
    with ThreadPoolExecutor(len(opened)) as pool:
        return list(pool.map(lambda pair: text_of(*pair), opened))


def ask_at_once(server, call, asked):
    """The texts of requests that all wait when the first is admitted, so that what is counted is always the same."""
    gate = threading.Event()
    held = server.model.call(lambda scheduler: gate.wait(60))
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = pool.map(lambda value: call(server.url, "POST", CHAT, value), asked)
        end = time.monotonic() + 60
        while server.model.answers_in_flight < len(asked):
            assert time.monotonic() < end, "not all requests arrived"
            time.sleep(0.01)
        gate.set()
        assert held.result()
        return [reply.json["choices"][0]["message"]["content"] for reply in replies]


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_all_adapters_of_a_batch_take_one_pass_a_token(model_folder, ranked, alone, call, monkeypatch, compiled):
    """Eight rows, over four adapters of ranks 4 to 64 and the base; each gets what a single user gets."""
    monkeypatch.setenv(SWITCH, compiled)
    models, tokens = [*NAMES, *NAMES[1:4]], 120
    asked = [body(name, text, max_tokens=tokens, logit_bias=NO_END) for name, text in zip(models, REQUESTS * 2)]
    with running(model_folder, ranked, ServeConfig(port=0, model_id="base")) as server:
        texts = ask_at_once(server, call, asked)
        passes, traces = steps(call, server.url), gauge(metrics(call, server.url), "traces_total")
        given = gauge(metrics(call, server.url), "completion_tokens_total")
        short = [call(server.url, "POST", CHAT, body(name)).json["choices"][0]["message"]["content"] for name in NAMES]
    assert given == tokens * len(models)
    # A row joins after at most three pieces of its prompt, each with a pass of those before it.
    assert tokens - 1 <= sum(passes) <= tokens + 3 * len(models)
    if compiled == "1":
        assert passes[0] <= PLAIN_STEPS
        assert 1 <= traces <= 12
    else:
        assert (passes[1], traces) == (0, 0)
    for name, value, text in zip(models, asked, texts):
        assert len(text) > 20
        assert text.startswith(alone(name, value["messages"][1]["content"], max_tokens=24)), name
    assert short == [alone(name, REQUESTS[0], max_tokens=40) for name in NAMES]


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_adapters_come_and_go_while_others_decode(
    model_folder, ranked, call, bytes_in_memory, monkeypatch, tmp_path, compiled
):
    """Loaded and unloaded beside rows that decode: these get what they get without them."""
    monkeypatch.setenv(SWITCH, compiled)
    base = ModelFolder(model_folder).config
    for number in range(3):  # of the form of a decoding row's adapter, so that its slots are copied and move
        config = LoRAConfig(rank=16, scale=1.0)
        write_adapter_folder(tmp_path / f"guest{number}", random_adapter(base, config, seed=50 + number))
    guests = {f"guest{number}": tmp_path / f"guest{number}" for number in range(3)}
    sizes = {name: bytes_in_memory(path) for name, path in {**ranked, **guests}.items()}
    room = sizes["rank16"] + sizes["rank4"] + 3 * max(sizes[name] for name in guests) // 2  # for one guest at a time
    config = ServeConfig(port=0, model_id="base", adapter_bytes=room, admin_roots=(tmp_path,), rows=6)
    served = {"rank4": ranked["rank4"], **guests, "rank16": ranked["rank16"]}
    with running(model_folder, served, config) as server:
        asked = [body(name, max_tokens=300, logit_bias=NO_END) for name in ("rank4", "rank16")]
        quiet = ask_together(server.url, asked)
        first = call(server.url, "POST", CHAT, body("guest0"))  # before rank16, so that its slot moves when it leaves
        assert first.status == 200
        opened = [open_stream(server.url, value) for value in asked]
        for name in ("guest1", "guest0", "guest2", "guest1"):
            reply = call(server.url, "POST", CHAT, body(name, max_tokens=4))
            assert reply.status == 200
            loaded = {one["name"] for one in call(server.url, "GET", ADMIN).json["adapters"] if one["loaded"]}
            assert loaded == {"rank4", "rank16", name}
        assert call(server.url, "DELETE", f"{ADMIN}/guest1").status == 200
        added = call(server.url, "POST", ADMIN, {"name": "late", "path": str(tmp_path / "guest2")})
        assert added.status == 200
        assert call(server.url, "POST", CHAT, body("late", max_tokens=4)).status == 200
        assert gauge(metrics(call, server.url), "rows") == 2, "both still decode"
        assert [text_of(*pair) for pair in opened] == quiet
        assert gauge(metrics(call, server.url), "adapter_bytes") <= room
        assert (steps(call, server.url)[1] > 0) == (compiled == "1")


def test_choices_beyond_a_batch_take_turns_and_share_the_prompt(model_folder, call):
    """n above the batch size: the prompt is computed once, and each choice is what it is in one batch."""
    answers = {}
    for size in (1, 2, 8):
        with running(model_folder, {}, ServeConfig(port=0, model_id="base", batch_size=size, prefix_bytes=0)) as server:
            reply = call(server.url, "POST", CHAT, body("base", n=5, temperature=1.9, seed=3, max_tokens=12)).json
            answers[size] = [choice["message"]["content"] for choice in reply["choices"]]
            assert gauge(metrics(call, server.url), "prompt_tokens_total") == reply["usage"]["prompt_tokens"]
    assert answers[1] == answers[2] == answers[8]
    assert len(set(answers[1])) > 1


def test_a_batch_of_one_row_gives_equal_bits_whoever_else_asks(model_folder, served_adapters, call):
    """Log probabilities are compared exactly, alone and beside others, with and without a known prefix."""
    names = ("base", "some", "dora")
    config = ServeConfig(port=0, model_id="base", batch_size=1, prefill_tokens=16)
    adapters = {name: served_adapters[name] for name in names[1:]}

    def ask(url, name):
        return call(url, "POST", CHAT, body(name, max_tokens=12, logprobs=True, top_logprobs=2)).json["choices"][0]

    with running(model_folder, adapters, config) as server:
        quiet = {name: ask(server.url, name) for name in names}
        others = [open_stream(server.url, body(name, max_tokens=3000, logit_bias=NO_END)) for name in names]
        assert {name: ask(server.url, name) for name in names} == quiet
        for connection, _ in others:
            connection.close()


def test_one_piece_of_one_prompt_is_read_between_two_tokens(model_folder, served_adapters, call, alone):
    """A long prompt, of a DoRA adapter too, does not stop those who are being answered."""
    config = ServeConfig(port=0, model_id="base", prefill_tokens=8)
    long = " ".join(["list the files"] * 40)
    with running(model_folder, {"dora": served_adapters["dora"]}, config) as server:
        streams = [open_stream(server.url, body(name, max_tokens=3000, logit_bias=NO_END)) for name in ("base", "dora")]
        for name in ("base", "dora"):
            before = gauge(metrics(call, server.url), "completion_tokens_total")
            reply = call(server.url, "POST", CHAT, body(name, long, max_tokens=1)).json
            pieces = reply["usage"]["prompt_tokens"] // 8
            assert gauge(metrics(call, server.url), "completion_tokens_total") - before >= 2 * pieces
        for connection, _ in streams:
            connection.close()


def test_a_step_that_fails_ends_the_answers_of_its_batch_and_no_others(model_folder, call):
    told = []
    with running(model_folder, {}, ServeConfig(port=0, model_id="base"), told.append) as server:
        decoder = server.model.call(lambda scheduler: scheduler.pool.decoder).result()
        connection, received = open_stream(server.url, body("base", max_tokens=3000, logit_bias=NO_END))

        def fail(*arguments, **more):
            raise RuntimeError("no memory")

        prefill, decoder.prefill = decoder.prefill, fail
        reply = call(server.url, "POST", CHAT, body("base"))
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert gauge(metrics(call, server.url), "rows") == 1, "the answer under way goes on"
        decoder.prefill = prefill
        step, decoder.step = decoder.step, fail
        while piece := connection.recv(1 << 16):
            received += piece
        connection.close()
        assert b"the model could not answer" in received
        decoder.step = step
        assert call(server.url, "POST", CHAT, body("base")).status == 200
        assert gauge(metrics(call, server.url), "rows") == 0
    assert [line for line in told if "no memory" not in line] == []
