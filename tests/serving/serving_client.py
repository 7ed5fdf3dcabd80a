"""Requests to a server, byte by byte, and what tests ask of it."""

import json
import socket
import time
from dataclasses import dataclass

SYSTEM = "Answer with one shell command."
REQUESTS = (
    "copy vome.go to zasu.txt",
    "sort vido.conf in reverse",
    "list the files",
    "show the first 3 lines of kano.md",
    "remove the folder zuba",
    "count the words in pelo.txt",
)


def chat(text, system=SYSTEM):
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


@dataclass(frozen=True)
class Reply:
    """What a server sent: status, headers by lower-case name, body."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error, which has OpenAI's shape."""
        (key,) = self.json
        assert key == "error"
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]


def send(url, data, *, timeout=30.0):
    """Sends bytes on a connection of their own and reads until the other end closes it."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return value


def gauge(metrics, name):
    """A value from the text of /metrics."""
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"mlx_afm_{name} ")]
    return float(line.split()[1])


def parse_reply(received):
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Reply(int(first.split()[1]), headers, body)


def request_bytes(method, path, body=b"", headers=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body or method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
