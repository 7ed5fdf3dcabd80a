"""Good requests with bytes changed, and what the OpenAPI document allows: nothing breaks the server."""

import json
import random
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving_client import chat, gauge, parse_reply, request_bytes

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASKED = {"messages": chat("list the files"), "max_tokens": 1}
STREAMED = {**ASKED, "stream": True, "n": 2, "stop": ["a"], "tools": [TOOL]}
SCORED = {"prompt": [5, 6, 7], "max_tokens": 1, "echo": True, "logprobs": 2, "logit_bias": {"7": 1}}
ITEMS = {"input": [{"role": "user", "content": "hi"}], "max_output_tokens": 1, "stream": True}
GOOD = [
    ("/v1/chat/completions", {"model": "base", **ASKED}),
    ("/v1/chat/completions", {"model": "small", **STREAMED}),
    ("/v1/completions", {"model": "base", **SCORED}),
    ("/v1/responses", {"model": "base", **ITEMS}),
    ("/tokenize", {"prompt": "list the files", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]


def mutated(rng):
    """A good request with a few bytes changed, inserted, left out, doubled or swapped, anywhere in it."""
    path, body = rng.choice(GOOD)
    data = bytearray(request_bytes("POST", path, json.dumps(body).encode(), ["Accept: */*"]))
    if rng.random() < 0.5:  # the body alone, with its right length
        head, _, data = bytes(data).partition(b"\r\n\r\n")
        data = bytearray(data)
    else:
        head = None
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        place = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 5))
        elif kind == 3:
            del data[place : place + rng.randrange(1, 9)]
        elif kind == 4:
            piece = data[place : place + rng.randrange(1, 40)]
            data[place:place] = piece
        else:
            data[place:] = data[place:][: rng.randrange(1, len(data) + 1)]
        if not data:
            data = bytearray(b"{")
    if head is None:
        return bytes(data)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(data), b"", b""]) + bytes(data)


def exchange(url, data):
    """What came back: a status, or 0 for a connection that was closed without an answer."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        received = b""
        try:
            connection.sendall(data)
            connection.settimeout(2)
            while piece := connection.recv(1 << 16):
                received += piece
        except (ConnectionError, TimeoutError):  # a mutated head may keep the connection
            pass
    if not received:
        return 0
    if received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    return parse_reply(received).status


def bombard(url, count, seed):
    rng = random.Random(seed)
    requests = [mutated(rng) for _ in range(count)]
    with ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(lambda data: exchange(url, data), requests))


def require_alive(url, call, alone):
    for model in ("base", "small"):
        body = {"model": model, "messages": chat("list the files"), "max_tokens": 8}
        reply = call(url, "POST", "/v1/chat/completions", body)
        assert reply.json["choices"][0]["message"]["content"] == alone(model, "list the files", max_tokens=8)
    metrics = call(url, "GET", "/metrics").body.decode()
    assert (gauge(metrics, "rows"), gauge(metrics, "waiting")) == (0, 0)


def require_known(statuses):
    assert all(status == 0 or status < 300 or 400 <= status < 500 for status in statuses), statuses


def test_three_hundred_mutations(server, call, alone):
    statuses = bombard(server.url, 300, seed=1)
    require_known(statuses)
    assert statuses[400] > 100
    require_alive(server.url, call, alone)


@pytest.mark.slow
def test_twenty_thousand_mutations(server, call, alone):
    statuses = bombard(server.url, 20_000, seed=2)
    print(dict(sorted(statuses.items())))
    require_known(statuses)
    require_alive(server.url, call, alone)


# `positive_data_acceptance` is left out: whether a body is accepted depends on more than a schema can say (known
# models, the order of turns, special tokens in texts, the room in the context).
CHECKS = ("--checks", "all", "--exclude-checks", "positive_data_acceptance")


def schemathesis(url, phases, examples, tmp_path):
    """What it says about the server, with so many examples for each operation."""
    program = Path(sys.executable).with_name("schemathesis")
    words = [
        program,
        "run",
        f"{url}/openapi.json",
        *CHECKS,
        "--phases",
        phases,
        "--max-examples",
        examples,
        "--seed",
        1,
    ]
    ran = subprocess.run(
        [*map(str, words), "--generation-database", "none"], cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_the_openapi_document_says_the_truth(server, call, alone, tmp_path):
    pytest.importorskip("schemathesis", reason="needs the dev extra")
    code, told = schemathesis(server.url, "fuzzing", 5, tmp_path)
    assert code == 0, told[-6000:]
    require_alive(server.url, call, alone)


@pytest.mark.slow
def test_two_thousand_examples_of_the_openapi_document(server, call, alone, tmp_path):
    pytest.importorskip("schemathesis", reason="needs the dev extra")
    code, told = schemathesis(server.url, "coverage,fuzzing", 60, tmp_path)
    print(told[-1500:])
    assert code == 0, told[-6000:]
    require_alive(server.url, call, alone)
