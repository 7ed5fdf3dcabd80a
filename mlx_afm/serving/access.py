"""What stands around the routes: who may ask, how much a request may be, and what a fault of ours becomes.

    Access        counts requests; connections, names of this machine, web pages from elsewhere
    CORS          of starlette, if origins are allowed
    RequestBody   the key; bodies whole, in time, within the limit, decompressed

Plain ASGI, so that streams pass through unbuffered.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import zlib
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_afm.files import to_json
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig, is_loopback
from mlx_afm.serving.metrics import Metrics

OPEN_PATHS = re.compile(r"/|/health|/openapi\.json|/docs(/.*)?")  # without the key: they tell nothing about anybody
LINGER_BYTES, LINGER_SECONDS = 1 << 20, 1.0  # read and thrown away so that a client still sending sees the refusal
ENCODINGS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
IDENTITY = "identity"  # a body as it is
HUNG_UP = 499


class JSONResponse(Response):
    """A strict JSON value: a number that is not finite becomes null."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The value as bytes."""
        return to_json(content, ascii_only=True).encode()


def error_response(error: APIError) -> JSONResponse:
    """What a client is told instead of an answer."""
    return JSONResponse(error.to_json(), error.status, error.headers)


class Access:
    """The outermost layer.

    Args:
        app: what is protected.
        config: limits.
        metrics: counts the answers.
        paths: that metrics tell apart.
        connections: how many are open.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        metrics: Metrics,
        paths: Collection[str],
        connections: Callable[[], int],
    ) -> None:
        self._app, self._config, self._metrics, self._paths = app, config, metrics, frozenset(paths)
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        status = HUNG_UP

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._require_allowed(scope)
            # HEAD is GET, whose body the connection leaves out.
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, receive, counted)
        except APIError as error:
            await _refuse(error, scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            path = "/admin" if scope["path"].startswith("/admin/") else path
            self._metrics.requests.labels(path, status).inc()

    def _require_allowed(self, scope: Scope) -> None:
        """Refuses whoever comes by another name than this machine's, where there is no key.

        Otherwise a web page could have its own name point here and read the answers (DNS rebinding), or have the
        user's browser send requests here whose answers it cannot read.
        """
        headers, version, close = Headers(scope=scope), scope["http_version"], {"Connection": "close"}
        if version not in ("1.0", "1.1"):
            raise APIError(400, "not an HTTP request", expected="HTTP/1.1", found=f"HTTP/{version}", headers=close)
        if self._connections() > self._config.connections:
            raise APIError(503, "too many connections", code="too_many_connections", retry_seconds=1)
        if self._config.api_key is not None:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        if not names_this_machine(host):
            advice, found = "Use localhost, or set an API key.", repr(host[:80])
            raise APIError(403, "a name that is not this machine's", code="wrong_host", found=found, advice=advice)
        if origin is not None and origin not in self._config.allow_origins and not _is_local_origin(origin):
            advice, found = "Name it with --allow-origin, or set an API key.", repr(origin[:80])
            raise APIError(403, "a web page from elsewhere", code="wrong_origin", found=found, advice=advice)


class RequestBody:
    """The innermost layer: checks the key, and hands on requests whose body is there.

    Args:
        app: the routes.
        config: limits.
        log: takes faults of ours.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, log: Callable[[str], object]) -> None:
        self._app, self._config, self._log = app, config, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        headers = Headers(scope=scope)
        try:
            if self._config.api_key is not None and not OPEN_PATHS.fullmatch(scope["path"]):
                _require_key(headers, self._config.api_key)
            sent = await self._read(headers, receive)
        except APIError as error:
            await _refuse(error, scope, receive, send)
            return
        except _HungUp:
            return
        try:
            body: bytes | None = self._decompressed(sent, _encoding(headers))
        except APIError as error:  # all of the body was read
            await error_response(error)(scope, receive, send)
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        # The routes have answered a fault of ours; uvicorn would write a traceback.
        try:
            await self._app(scope, replay, send)
        except Exception as error:
            self._log(f"{scope['method']} {scope['path'][:80]}: {type(error).__name__}: {error}")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body of a request, as it was sent."""
        encoding, seconds = _encoding(headers), self._config.body_seconds
        if encoding not in (IDENTITY, *ENCODINGS):
            what, expected = "a body in an unknown encoding", "gzip or deflate"
            raise APIError(415, what, expected=expected, found=repr(encoding[:40]))
        length = headers.get("content-length", "")
        if re.fullmatch("[0-9]+", length) and int(length[:20]) > self._config.body_bytes:
            raise self._too_large(length[:20])
        try:
            return await asyncio.wait_for(self._receive_all(receive), seconds)
        except asyncio.TimeoutError as error:
            what = "the request's body did not arrive in time"
            raise APIError(408, what, expected=f"within {seconds:g} s") from error

    async def _receive_all(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _HungUp
            body += message.get("body", b"")
            if len(body) > self._config.body_bytes:
                raise self._too_large(f"more than {self._config.body_bytes}")
            if not message.get("more_body"):
                return bytes(body)

    def _decompressed(self, body: bytes, encoding: str) -> bytes:
        if encoding == IDENTITY:
            return body
        decoder, limit = zlib.decompressobj(ENCODINGS[encoding]), self._config.body_bytes
        try:
            text = decoder.decompress(body, limit + 1)
        except zlib.error as error:
            raise APIError(400, f"the body cannot be decompressed: {error}", code="invalid_encoding") from error
        if len(text) > limit:
            raise self._too_large(f"more than {limit} decompressed")
        if not decoder.eof or decoder.unused_data:
            raise APIError(400, "the compressed body does not end where it should", code="invalid_encoding")
        return text

    def _too_large(self, found: str) -> APIError:
        expected = f"at most {self._config.body_bytes} bytes"
        return APIError(413, "the request's body is too large", expected=expected, found=found)


def _encoding(headers: Headers) -> str:
    return headers.get("content-encoding", IDENTITY).strip().lower()


class _HungUp(Exception):
    """The client is gone."""


async def _refuse(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error; first reads what the client is still sending, within limits."""

    async def discard() -> bool:
        read, more = 0, True
        while more and read < LINGER_BYTES:
            message = await receive()
            more, read = message.get("more_body", False), read + len(message.get("body", b""))
        return not more

    try:
        whole = await asyncio.wait_for(discard(), LINGER_SECONDS)
    except asyncio.TimeoutError:
        whole = False
    response = error_response(error)
    if not whole:  # what follows would be read as the next request
        response.headers["Connection"] = "close"
    await response(scope, receive, send)


def names_this_machine(host: str) -> bool:
    """Whether a request came under a name of this machine, or under none."""
    host = host.lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return not host or is_loopback(name)


def _is_local_origin(origin: str) -> bool:
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


def _require_key(headers: Headers, key: str) -> None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8"), key.encode("utf-8")):
        expected = "Authorization: Bearer KEY"
        raise APIError(401, "the API key is missing or wrong", code="invalid_api_key", expected=expected)
