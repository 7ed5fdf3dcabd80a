"""What a client cannot do: everything has a limit, and whoever meets one is told which."""

import json
import socket

import pytest

from mlx_afm.errors import ConfigError
from mlx_afm.serving import ServeConfig, find_adapters, parse_bytes, running
from serving_client import chat, gauge, parse_reply, request_bytes, send, wait_for

CHAT, NO_END = "/v1/chat/completions", {"2": -100, "4": -100}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def body(**settings):
    return {"model": "base", "messages": chat("list the files"), "max_tokens": 4, **settings}


LONG = body(max_tokens=3000, logit_bias=NO_END, stream=True)  # ends for no reason of its own


def open_stream(url, value=LONG):
    """A connection on which an answer has begun."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(request_bytes("POST", CHAT, json.dumps(value).encode()))
    received = b""
    while b"data: " not in received:
        piece = connection.recv(1 << 16)
        assert piece, received
        received += piece
    return connection


def test_health_models_and_metrics(server, call):
    assert call(server.url, "GET", "/health").json == {"status": "ok"}
    assert call(server.url, "POST", CHAT, body()).status == 200
    reply = call(server.url, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    text = reply.body.decode()
    assert 'mlx_afm_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'mlx_afm_first_token_seconds_bucket{le="+Inf"}' in text
    assert gauge(text, "completion_tokens_total") >= 4
    assert gauge(text, "adapter_bytes") <= 10**9


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"nonsense\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /health HTTP/9.9\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000, 431, "too large"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400, "Content-Length"),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "Content-Length"),
        (POST + b"Content-Length: 9999999\r\n\r\n", 413, "at most 1000000 bytes"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "not an HTTP request"),
        (POST + b"Content-Length: 10\r\n\r\nabc", 408, "within 1 s"),
        (b"POST /v1/comp", 408, "head did not arrive"),
        (request_bytes("GET", "/v1/nothing"), 404, "no such path"),
        (request_bytes("GET", CHAT), 405, "expected POST"),
        (request_bytes("POST", "/metrics"), 405, "expected GET"),
        (request_bytes("POST", CHAT, b"{"), 400, "not JSON"),
        (request_bytes("POST", CHAT, b"[]"), 400, "not a JSON object"),
        (request_bytes("POST", CHAT, b'{"a": NaN}'), 400, "NaN is not a JSON value"),
        (request_bytes("POST", CHAT, b'{"a": "\xff"}'), 400, "not UTF-8"),
        (request_bytes("POST", CHAT, b"[" * 100_000), 400, "nested too deeply"),
        (request_bytes("POST", CHAT, b'{"n": ' + b"9" * 10_000 + b"}"), 400, "not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_request(data, status, says, server):
    reply = parse_reply(send(server.url, data))
    assert reply.status == status
    assert says in reply.error["message"]


def test_a_connection_serves_many_requests_also_sent_ahead(server):
    one = request_bytes("POST", CHAT, json.dumps(body()).encode()).replace(b"Connection: close", b"X-Nothing: 1")
    last = request_bytes("GET", "/health")
    received = send(server.url, one + one + last)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.endswith(b'{"status": "ok"}')


def test_a_body_is_asked_for(server):
    data = request_bytes("POST", CHAT, json.dumps(body()).encode(), ["Expect: 100-continue"])
    head, _, rest = data.partition(b"\r\n\r\n")
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(rest)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_hangs_up_frees_its_place(server, call):
    def metrics():
        return call(server.url, "GET", "/metrics").body.decode()

    before = gauge(metrics(), "cancelled_total")
    connections = [open_stream(server.url), open_stream(server.url, {**LONG, "model": "some", "n": 2})]
    assert gauge(metrics(), "rows") == 3
    for connection in connections:
        connection.close()
    wait_for(lambda: gauge(metrics(), "rows") == 0)
    assert gauge(metrics(), "cancelled_total") == before + 2


def test_a_queue_has_an_end(model_folder, call):
    config = ServeConfig(port=0, model_id="base", rows=1, queue=1, request_seconds=60)
    with running(model_folder, {}, config) as small:
        first = open_stream(small.url)
        with socket.create_connection(first.getpeername()) as second:
            second.sendall(request_bytes("POST", CHAT, json.dumps(body()).encode()))
            wait_for(lambda: gauge(call(small.url, "GET", "/metrics").body.decode(), "waiting") == 1)
            third = call(small.url, "POST", CHAT, body())
            assert (third.status, third.error["code"]) == (429, "queue_full")
            assert int(third.headers["retry-after"]) >= 1
            first.close()
            second.settimeout(30)
            assert second.recv(1000).startswith(b"HTTP/1.1 200 OK")  # its turn has come


def test_connections_have_a_limit(model_folder, call):
    config = ServeConfig(port=0, model_id="base", connections=2)
    with running(model_folder, {}, config) as small:
        host, port = small.url.removeprefix("http://").rsplit(":", 1)
        held = [socket.create_connection((host, int(port))) for _ in range(2)]
        reply = wait_for(lambda: (r := call(small.url, "GET", "/health")).status == 503 and r)
        assert reply.error["code"] == "too_many_connections"
        for connection in held:
            connection.close()
        wait_for(lambda: call(small.url, "GET", "/health").status == 200)


def test_an_answer_has_a_time_limit(model_folder, call):
    config = ServeConfig(port=0, model_id="base", request_seconds=0.5)
    with running(model_folder, {}, config) as quick:
        reply = call(quick.url, "POST", CHAT, {**LONG, "stream": False})
        assert (reply.status, reply.error["code"]) == (504, "timeout")
        stream = call(quick.url, "POST", CHAT, LONG).body
        assert b'"code": "timeout"' in stream
        assert stream.endswith(b"0\r\n\r\n")
        assert call(quick.url, "POST", CHAT, body()).status == 200


def test_a_key_is_asked_for(model_folder, call):
    config = ServeConfig(port=0, host="0.0.0.0", model_id="base", api_key="correct-horse")
    with running(model_folder, {}, config) as closed:
        url = closed.url.replace("0.0.0.0", "127.0.0.1")
        assert call(url, "GET", "/health").status == 200
        for headers in ([], ["Authorization: Bearer wrong"], ["Authorization: Basic correct-horse"]):
            reply = call(url, "GET", "/v1/models", headers=headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert reply.error["type"] == "authentication_error"
        reply = call(url, "POST", CHAT, body(), headers=["Authorization: Bearer correct-horse"])
        assert reply.status == 200
        assert call(url, "GET", "/metrics").status == 401


def test_without_a_key_only_this_machines_names_are_answered(server):
    data = request_bytes("GET", "/v1/models").replace(b"Host: localhost", b"Host: evil.example:8080")
    reply = parse_reply(send(server.url, data))
    assert (reply.status, reply.error["code"]) == (403, "wrong_host")
    for name in (b"127.0.0.1:1", b"[::1]:8080", b"LOCALHOST"):
        named = request_bytes("GET", "/v1/models").replace(b"Host: localhost", b"Host: " + name)
        assert parse_reply(send(server.url, named)).status == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://page.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_from_elsewhere_are_not_answered(origin, status, server, call):
    reply = call(server.url, "POST", CHAT, body(), [f"Origin: {origin}"])
    assert reply.status == status
    if status == 403:
        assert reply.error["code"] == "wrong_origin"


def test_rows_of_one_are_enough(model_folder, served_adapters, call, alone):
    """Batches of one row: nothing others ask changes a bit of an answer."""
    config = ServeConfig(port=0, model_id="base", batch_size=1, kv_bits=8, prefill_tokens=7)
    with (
        running(model_folder, {"some": served_adapters["some"]}, config) as single,
        open_stream(single.url),
        open_stream(single.url, {**LONG, "model": "some"}),
    ):
        for model in ("base", "some", "base"):
            reply = call(single.url, "POST", CHAT, body(model=model, max_tokens=12))
            assert reply.json["choices"][0]["message"]["content"] == alone(model, "list the files", max_tokens=12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "can be reached by others"),
        ({"host": "example.org"}, "can be reached by others"),
        ({"api_key": "short"}, "at least 8"),
        ({"port": 70000}, "port: expected at most 65535"),
        ({"rows": 0}, "rows: expected at least 1"),
        ({"body_seconds": float("nan")}, "body_seconds: expected more than 0"),
        ({"temperature": 3.0}, "temperature"),
        ({"context_tokens": 5000}, "context_tokens: expected at most 4096"),
        ({"kv_bits": 4}, "kv_bits"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        ServeConfig(**settings)


def test_sizes_are_read_with_their_units():
    sizes = {"200MB": 200_000_000, "1.5 GiB": 1_610_612_736, "4096": 4096, "1kb": 1000, "0": 0}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "MB", "-1", "1 parsec", "1e9", "nan"):
        with pytest.raises(ConfigError, match="not a size"):
            parse_bytes(text)


def test_adapters_are_found_in_a_folder(served_adapters, tmp_path):
    found = find_adapters(served_adapters["small"].parent)
    assert set(found) == {"whole", "small", "some", "dora", "spare"}
    assert found["spare"].suffix == ".pt"
    with pytest.raises(ConfigError, match="no adapters here"):
        find_adapters(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        find_adapters(tmp_path / "none")
    for name in ("a.pt", "a.fmadapter"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="two adapters of the same name"):
        find_adapters(tmp_path)
