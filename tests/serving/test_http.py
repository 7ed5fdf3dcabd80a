"""HTTP as clients, proxies and browsers speak it."""

import gzip
import json
import socket
import time
import zlib

import httpx
import pytest

from mlx_afm.serving import ServeConfig, running
from serving_client import chat, gauge, parse_reply, request_bytes, send, wait_for

CHAT = "/v1/chat/completions"
BODY = {"model": "base", "messages": chat("list the files"), "max_tokens": 4}
LONG = {**BODY, "max_tokens": 3000, "logit_bias": {"2": -100, "4": -100}, "stream": True}
DATA = json.dumps(BODY).encode()
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/v1/models/base", "/metrics", "/", "/docs", "/openapi.json"]
)
def test_head_is_get_without_the_body(path, client):
    """RFC 9110, 9.3.2: the next answer on the connection is not what HEAD left out."""
    for _ in range(2):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head(CHAT).status_code == 405


def test_options_says_what_a_path_allows(client):
    for path, allowed in (
        (CHAT, {"POST"}),
        ("/v1/models", {"GET", "HEAD"}),
        ("/admin/adapters", {"GET", "HEAD", "POST"}),
        ("/admin/adapters/x", {"DELETE"}),
        ("/", {"GET", "HEAD"}),
    ):
        reply = client.options(path)
        assert (reply.status_code, reply.content) == (204, b"")
        assert set(reply.headers["allow"].split(", ")) == allowed | {"OPTIONS"}
    assert client.options("/v1/nothing").status_code == 404


def test_a_body_in_chunks(client, alone):
    def pieces():
        for start in range(0, len(DATA), 7):
            yield DATA[start : start + 7]

    wanted = alone("base", "list the files", max_tokens=4)
    for _ in range(2):
        assert answer(client.post(CHAT, content=pieces(), headers=JSON)) == wanted
    large = client.post(CHAT, content=(b" " * 100_000 for _ in range(20)), headers=JSON)
    assert (large.status_code, "at most 1000000 bytes" in large.text) == (413, True)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body(encoding, compress, client, alone):
    headers = {**JSON, "Content-Encoding": encoding}
    wanted = alone("base", "list the files", max_tokens=4)
    assert answer(client.post(CHAT, content=compress(DATA), headers=headers)) == wanted
    bomb = client.post(CHAT, content=compress(b" " * 10**8), headers=headers)
    assert (bomb.status_code, "decompressed" in bomb.text) == (413, True)
    for broken in (compress(DATA)[:-3], DATA, compress(DATA) + b"x", b""):
        refused = client.post(CHAT, content=broken, headers=headers)
        assert (refused.status_code, refused.headers.get("connection")) == (400, None), "all of it was read"
    assert client.post(CHAT, content=DATA, headers={**headers, "Content-Encoding": "br"}).status_code == 415


def test_the_body_must_be_json(client):
    assert client.post(CHAT, content=DATA, headers={"Content-Type": "text/plain"}).status_code == 415
    assert (
        client.post(CHAT, content=DATA, headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200
    )
    missing = client.post(CHAT, headers=JSON)
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "invalid_value")


def test_a_half_closed_connection_frees_its_row(server, call):
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request_bytes("POST", CHAT, json.dumps(LONG).encode()))
        assert connection.recv(100)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: gauge(call(server.url, "GET", "/metrics").body.decode(), "rows") == 0)
        while connection.recv(1 << 16):
            pass  # the server has closed it


def test_a_client_that_does_not_read_is_cut_off(model_folder, call):
    config = ServeConfig(port=0, model_id="base", request_seconds=1.0)
    with running(model_folder, {}, config) as quick, socket.socket() as connection:
        host, port = quick.url.removeprefix("http://").rsplit(":", 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        body = {**LONG, "n": 8, "logprobs": True, "top_logprobs": 20}
        connection.sendall(request_bytes("POST", CHAT, json.dumps(body).encode()))
        wait_for(lambda: gauge(call(quick.url, "GET", "/metrics").body.decode(), "rows") == 8)
        wait_for(lambda: gauge(call(quick.url, "GET", "/metrics").body.decode(), "rows") == 0)
        wait_for(lambda: gauge(call(quick.url, "GET", "/metrics").body.decode(), "connections") == 1)


def test_pages_of_named_origins_read_answers(model_folder):
    page, other = "https://app.example", "https://other.example"
    config = ServeConfig(port=0, host="127.0.0.1", model_id="base", api_key="correct-horse", allow_origins=(page,))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    with running(model_folder, {}, config) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        ahead = client.options(CHAT, headers={"Origin": page, **asks})
        assert (ahead.status_code, ahead.headers["access-control-allow-origin"]) == (200, page)
        assert "POST" in ahead.headers["access-control-allow-methods"]
        assert "authorization" in ahead.headers["access-control-allow-headers"]
        key = {"Authorization": "Bearer correct-horse"}
        good = client.post(CHAT, json=BODY, headers={"Origin": page, **key})
        assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, page)
        refused = client.post(CHAT, json=BODY, headers={"Origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
        assert client.options(CHAT, headers={"Origin": other, **asks}).status_code == 400
        stranger = client.post(CHAT, json=BODY, headers={"Origin": other, **key})
        assert "access-control-allow-origin" not in stranger.headers


def test_without_a_key_only_named_pages_are_answered(model_folder):
    page = "https://app.example"
    with (
        running(model_folder, {}, ServeConfig(port=0, model_id="base", allow_origins=(page,))) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        assert client.get("/v1/models", headers={"Origin": page}).headers["access-control-allow-origin"] == page
        assert client.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


def test_what_needs_no_key(model_folder):
    config = ServeConfig(port=0, model_id="base", api_key="correct-horse")
    with running(model_folder, {}, config) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for path, status in (("/health", 200), ("/", 200), ("/docs", 200), ("/openapi.json", 200), ("/v1/models", 401)):
            assert client.get(path).status_code == status, path


def test_documents_and_page_can_be_switched_off(model_folder, client):
    html = client.get("/docs").text
    assert "/docs/static/swagger-ui-bundle.js" in html
    assert "https://" not in html.replace("https://fastapi", "")  # nothing comes from elsewhere
    assert len(client.get("/docs/static/swagger-ui-bundle.js").content) > 10**5
    assert set(client.get("/openapi.json").json()["paths"]) >= {CHAT, "/v1/responses", "/v1/completions", "/tokenize"}
    config = ServeConfig(port=0, model_id="base", docs=False, page=False)
    with running(model_folder, {}, config) as server, httpx.Client(base_url=server.url) as plain:
        for path in ("/", "/docs", "/openapi.json", "/docs/static/swagger-ui-bundle.js"):
            assert plain.get(path).status_code == 404, path


def test_answers_are_not_held_back(client):
    """Nagle's algorithm would hold the end of each answer back until the client acknowledges its beginning: 40 ms."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        client.post("/tokenize", json={"prompt": "list the files"}).raise_for_status()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.03


def test_an_answer_on_a_connection_that_closes(server):
    old = request_bytes("POST", CHAT, DATA).replace(b"HTTP/1.1", b"HTTP/1.0")
    reply = parse_reply(send(server.url, old))
    assert reply.status == 200
    assert reply.json["choices"]
