"""HTTP/1.1 on asyncio streams: as much as an API on JSON needs, with a limit on everything.

A request is `METHOD TARGET HTTP/1.x`, headers, and a body of `Content-Length` bytes. A body in chunks is refused
(411), since its size is not known before it is there. Answers are JSON of known length, or events (`text/event-stream`)
in chunks. What is not a request gets a 4xx and the connection is closed.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlx_afm.files import to_json
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig, is_loopback

HEAD_BYTES = 32 * 1024
AHEAD_BYTES = 64 * 1024  # of a next request that may arrive while this one is answered
LINGER_BYTES, LINGER_SECONDS = 1 << 20, 1.0  # read and thrown away so that a client still sending sees the refusal
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
ONCE = ("content-length", "host", "authorization", "content-type")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        method, path, query: of the request line; the path as it came, not decoded.
        headers: by lower-case name.
        body: its bytes.
        peer: address of the other end.
        keep_alive: whether the client wants the connection to stay open.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    peer: str
    keep_alive: bool


class Closed(Exception):
    """The client is gone."""


class Connection:
    """One client's connection.

    Args:
        reader, writer: of asyncio.
        config: limits.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, config: ServeConfig) -> None:
        self._reader, self._writer, self._config = reader, writer, config
        self._buffer = bytearray()
        peer = writer.get_extra_info("peername")
        self.peer = str(peer[0]) if peer else ""
        self.streaming = False

    async def read_request(self) -> Request | None:
        """The next request; None if there is none.

        Raises:
            APIError: not a request, or one beyond the limits. Closed: it broke off.
        """
        if not self._buffer:
            try:
                await asyncio.wait_for(self._fill(), self._config.idle_seconds)
            except (asyncio.TimeoutError, Closed):
                return None
        head = await _within(self._head(), self._config.header_seconds, "the request's head")
        method, path, query, version, headers = parse_head(head)
        length = self._body_length(headers)
        if headers.get("expect", "").lower() == "100-continue" and len(self._buffer) < length:
            await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _within(self._take(length), self._config.body_seconds, "the request's body")
        asked = headers.get("connection", "").lower()
        return Request(
            method=method,
            path=path,
            query=query,
            headers=headers,
            body=body,
            peer=self.peer,
            keep_alive="close" not in asked and (version == "1.1" or "keep-alive" in asked),
        )

    async def hung_up(self) -> None:
        """Returns once the client has closed the connection; a next request that arrives meanwhile is kept."""
        with suppress(Closed):
            while len(self._buffer) < AHEAD_BYTES:
                await self._fill()
            await asyncio.Event().wait()

    async def respond(
        self, status: int, value: Any, headers: Mapping[str, str] | None = None, *, keep_alive: bool = True
    ) -> None:
        """Sends a JSON value, or text as it is."""
        text = isinstance(value, str)
        body = value.encode() if text else to_json(value, ascii_only=True).encode()
        kind = "text/plain; version=0.0.4; charset=utf-8" if text else "application/json"
        fields = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
        await self._write(_head_bytes(status, fields, keep_alive) + body)

    async def start_events(self, *, keep_alive: bool) -> None:
        """Begins a stream of events."""
        self.streaming = True
        fields = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "Transfer-Encoding": "chunked",
        }
        await self._write(_head_bytes(200, fields, keep_alive))

    async def send_event(self, value: Any) -> None:
        """Sends one event: a JSON value, or text as it is."""
        data = f"data: {value if isinstance(value, str) else to_json(value, ascii_only=True)}\n\n".encode()
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_events(self) -> None:
        """Ends the stream."""
        self.streaming = False
        await self._write(b"0\r\n\r\n")

    async def close(self, *, linger: bool = False) -> None:
        """Closes the connection; `linger` first reads what the client is still sending."""
        with suppress(OSError, Closed, asyncio.TimeoutError):
            if linger:
                self._buffer.clear()
                self._writer.write_eof()
                await asyncio.wait_for(self._discard(), LINGER_SECONDS)
        self._writer.close()
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), LINGER_SECONDS)

    async def _discard(self) -> None:
        read = 0
        while read < LINGER_BYTES and (data := await self._reader.read(1 << 16)):
            read += len(data)

    async def _fill(self) -> None:
        try:
            data = await self._reader.read(1 << 16)
        except OSError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._buffer += data

    async def _head(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES)) < 0:
            if len(self._buffer) >= HEAD_BYTES:
                raise APIError(431, "the request's head is too large", expected=f"at most {HEAD_BYTES} bytes")
            if b"\n\n" in self._buffer:
                raise APIError(400, "not an HTTP request", expected="lines that end in CR LF")
            await self._fill()
        return await self._take(end + 4)

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._fill()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _body_length(self, headers: Mapping[str, str]) -> int:
        if "transfer-encoding" in headers:
            raise APIError(411, "a body of unknown length", expected="Content-Length, not Transfer-Encoding")
        text, limit = headers.get("content-length", "0"), self._config.body_bytes
        if not re.fullmatch(r"[0-9]{1,20}", text):
            raise APIError(400, "Content-Length is not a number", found=repr(text[:40]))
        if int(text) > limit:
            raise APIError(413, "the request's body is too large", expected=f"at most {limit} bytes", found=text)
        return int(text)

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await asyncio.wait_for(self._writer.drain(), self._config.request_seconds)
        except (OSError, asyncio.TimeoutError) as error:
            raise Closed from error


async def _within(work: Awaitable[T], seconds: float, what: str) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:
        raise APIError(408, f"{what} did not arrive in time", expected=f"within {seconds:g} s") from error


def parse_head(head: bytes) -> tuple[str, str, str, str, dict[str, str]]:
    """Method, path, query, version and headers of a request's head.

    Raises:
        APIError: not the head of an HTTP/1 request.
    """
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    match = re.fullmatch(r"([A-Z]{1,16}) (/[!-~]*|\*) HTTP/(1\.[01])", first)
    if match is None:
        raise APIError(400, "not an HTTP request", expected="METHOD /path HTTP/1.1", found=repr(first[:80]))
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not colon or not TOKEN.fullmatch(name) or any(ord(c) < 32 and c != "\t" for c in value):
            raise APIError(400, "not a header", found=repr(line[:80]))
        if name in headers and name in ONCE:
            raise APIError(400, f"the header {name} is there twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    path, _, query = match[2].partition("?")
    return match[1], path, query, match[3], headers


def _head_bytes(status: int, fields: Mapping[str, str], keep_alive: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields.items())]
    lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def require_allowed(request: Request, config: ServeConfig) -> None:
    """Refuses whoever has not the key; and, where there is none, whoever comes by another name than this machine's.

    Without the second, a web page could have its own name point here and read the answers (DNS rebinding), or have the
    user's browser send requests here whose answers it cannot read.

    Raises:
        APIError: 401 or 403.
    """
    if config.api_key is not None:
        if request.path != "/health" and not _has_key(request, config.api_key):
            expected = "Authorization: Bearer KEY"
            raise APIError(401, "the API key is missing or wrong", code="invalid_api_key", expected=expected)
        return
    if not names_this_machine(request):
        advice, found = "Use localhost, or set an API key.", repr(request.headers["host"][:80])
        raise APIError(403, "a name that is not this machine's", code="wrong_host", found=found, advice=advice)
    origin = request.headers.get("origin")
    if origin is not None and not _is_local_origin(origin):
        advice, found = "Set an API key.", repr(origin[:80])
        raise APIError(403, "a web page from elsewhere", code="wrong_origin", found=found, advice=advice)


def _is_local_origin(origin: str) -> bool:
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


def names_this_machine(request: Request) -> bool:
    """Whether a request came under a name of this machine, or under none."""
    host = request.headers.get("host", "").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return not host or is_loopback(name)


def _has_key(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8"), key.encode("utf-8"))
