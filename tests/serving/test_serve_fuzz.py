"""Requests that are none, by the thousand: each is refused with a 4xx, and the next good one is answered."""

import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from serving_client import chat, gauge, parse_reply, request_bytes, send

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = {"model": "base", "messages": chat("list the files"), "max_tokens": 8}
GOOD_TEXT = {"model": "base", "prompt": "cp ", "max_tokens": 2}
HUGE = 10**400
DEEP = "[" * 3000 + "]" * 3000
# For each field values that no request may have.
WRONG = {
    "model": [None, 1, [], {}, "", "nobody", "../../etc/passwd", "base\0", "x" * 9999, True],
    "messages": [None, "hi", 1, {}, [], [1], [[]], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}],
                 [{"role": "user", "content": 1}], [{"role": "user", "content": None}],
                 [{"role": "system", "content": "x"}],
                 [{"role": "user", "content": "x", "extra": 1}], [{"role": "tool", "content": "x"}],
                 [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
                 [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a\0b"}],
                 [{"role": "user", "content": "<turn_start>"}], [{"role": "user", "content": "word " * 9000}],
                 [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": "z"}]],
    "max_tokens": [0, -2, 1.5, "8", [], HUGE, -HUGE, True, 4096, 2**31],
    "max_completion_tokens": [0, "1", 5000, {}],
    "temperature": [-1, 2.1, "hot", [], HUGE, True, 1e308],
    "top_p": [-0.1, 1.1, "x", {}, HUGE],
    "top_k": [-2, 512, 1.5, "x", HUGE],
    "min_p": [1, 2, -1, "x"],
    "n": [0, 9, -1, 1.5, "2", HUGE, []],
    "seed": [1.5, "x", HUGE, -HUGE, []],
    "stop": [1, [1], [""], "", ["a"] * 5, {}, [["a"]], [None]],
    "stream": [1, "yes", [], 0],
    "stream_options": [1, {"include_usage": True}, [], {"x": 1}],
    "logprobs": [1, "x", {}],
    "top_logprobs": [1, 21, -1, "x"],
    "logit_bias": [1, [], {"x": 1}, {"-1": 1}, {"512": 1}, {"1": "x"}, {"1": 101}, {"1": None}, {"9" * 5000: 1}],
    "frequency_penalty": [3, -3, "x", []],
    "presence_penalty": [3, -3, "x", HUGE],
    "tools": [1, {}, [1], [{}], [{"type": "function"}], [{"type": "function", "function": {}}],
              [{"type": "function", "function": {"name": 1}}], "x"],
    "tool_choice": ["required", 1, {}, {"type": "function", "function": {"name": "x"}}],
    "parallel_tool_calls": ["x", 1],
    "response_format": [1, "json", {}, {"type": "xml"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {}},
                        {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}},
                        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}],
    "modalities": [["audio"], "text", 1],
    "functions": [[], 1],
    "adapter_path": ["x"],
    "": [1],
}  # fmt: skip
WRONG_TEXT = {
    "prompt": [None, 1, {}, [], "", [[]], [-1], [512], [1, "x"], ["a", 1], ["a"] * 99, [HUGE], "\ud800", [True],
               "word " * 9000],
    "echo": [1, "yes"],
    "suffix": ["x", 1],
    "best_of": [2, "x"],
    "logprobs": [6, -1, True, "x"],
    "messages": [[]],
}  # fmt: skip


def wrong_field(rng):
    path, good, wrong = rng.choice([(CHAT, GOOD, WRONG), (CHAT, GOOD, WRONG), (TEXT, GOOD_TEXT, WRONG_TEXT)])
    name = rng.choice(list(wrong))
    return request_bytes("POST", path, json.dumps({**good, name: rng.choice(wrong[name])}).encode())


def cut_json(rng):
    whole = json.dumps(GOOD).encode()
    return request_bytes("POST", CHAT, whole[: rng.randrange(1, len(whole))])


def broken_text(rng):
    whole = bytearray(json.dumps(GOOD).encode())
    place = rng.randrange(len(whole))
    whole[place:place] = rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"\x80" * 9])
    return request_bytes("POST", CHAT, bytes(whole))


def odd_json(rng):
    text = rng.choice(
        [DEEP, '{"messages": ' + DEEP + "}", '{"a":' * 5000, "9" * 20000, "-", "NaN", '{"seed": Infinity}', "null",
         "true", '"x"', "[]", "{} {}", "", '{"n": 1e999999}', '{"stop": ' + DEEP + ', "model": "base"}', "\ufeff{}"]
    )  # fmt: skip
    return request_bytes("POST", rng.choice([CHAT, TEXT]), text.encode())


def no_http(rng):
    return rng.choice(
        [rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n", b"GET\r\n\r\n", b"\r\n\r\n",
         b"POST " + CHAT.encode() + b"\r\n\r\n",
         b"GET /v1/models HTTP/1.1\r\nHost: a b\r\n: x\r\n\r\n", b"GET /v1/models HTTP/1.1\r\n folded\r\n\r\n",
         b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
         b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
         b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
         b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", b"GET http://x/ HTTP/1.1\r\n\r\n",
         request_bytes("DELETE", CHAT), request_bytes("GET", "/../../etc/passwd"),
         request_bytes("GET", "/v1/models/%2e%2e"),
         request_bytes("OPTIONS", "*"), request_bytes("POST", "/admin/adapters", b'{"name": "x", "path": "/"}')]
    )  # fmt: skip


KINDS = [(wrong_field, 12), (cut_json, 2), (broken_text, 2), (odd_json, 2), (no_http, 2)]


def refused(url, data):
    """The status of a refusal."""
    reply = parse_reply(send(url, data))
    assert 400 <= reply.status < 500, (reply, data[:500])
    assert reply.error["message"]
    return reply.status


def slow(url):
    """A body that does not come in time."""
    whole = request_bytes("POST", CHAT, json.dumps(GOOD).encode())
    return refused(url, whole[:-3])


def gone(url, rng):
    """A client that leaves at some point of a request or of its answer."""
    whole = request_bytes("POST", CHAT, json.dumps({**GOOD, "stream": rng.random() < 0.5, "max_tokens": 400}).encode())
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(whole[: rng.randrange(1, len(whole))] if rng.random() < 0.5 else whole)
        time.sleep(rng.random() * 0.05)
    return 0


def assault(url, count, seed):
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS)
    work = [partial(refused, url, kind(rng)) for kind in rng.choices(kinds, weights, k=round(count * 0.9))]
    work += [partial(gone, url, random.Random(number)) for number in range(round(count * 0.07))]
    work += [partial(slow, url)] * (count - len(work))
    rng.shuffle(work)
    with ThreadPoolExecutor(12) as pool:
        return Counter(pool.map(lambda one: one(), work))


def require_alive(url, call, alone):
    for model in ("base", "small"):
        answer = call(url, "POST", CHAT, {**GOOD, "model": model})
        assert answer.json["choices"][0]["message"]["content"] == alone(model, "list the files", max_tokens=8)
    assert gauge(call(url, "GET", "/metrics").body.decode(), "rows") == 0


@pytest.mark.parametrize(
    ("path", "good", "wrong"), [(CHAT, GOOD, WRONG), (TEXT, GOOD_TEXT, WRONG_TEXT)], ids=["chat", "text"]
)
def test_every_wrong_value_is_refused(path, good, wrong, server, call):
    assert call(server.url, "POST", path, good).status == 200
    for name, values in wrong.items():
        for value in values:
            reply = call(server.url, "POST", path, {**good, name: value})
            assert 400 <= reply.status < 500, (name, value)
            assert reply.error["message"]


def test_a_hundred_bad_requests(server, call, alone):
    told = assault(server.url, 100, seed=1)
    assert told[0] == 7
    assert sum(told.values()) == 100
    require_alive(server.url, call, alone)


@pytest.mark.slow
def test_two_thousand_bad_requests(server, call, alone):
    told = assault(server.url, 2000, seed=2)
    print(dict(sorted(told.items())))
    assert sum(told.values()) == 2000
    assert set(told) <= {0, 400, 403, 404, 405, 408, 411, 413, 415, 431}
    require_alive(server.url, call, alone)
