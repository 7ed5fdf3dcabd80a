"""uvicorn's HTTP/1.1 connections, with limits that it does not have: on time, on their number, and on slow readers."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_afm.files import to_json
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig

HEAD_BYTES = 32 * 1024
EXTRA_CONNECTIONS = 16  # beyond the limit, that are told so


class LimitedProtocol(H11Protocol):
    """One connection.

    A first request must begin within `idle_seconds` and its head be there `header_seconds` later. A client that does
    not read what it is sent for `request_seconds` is cut off. What is not HTTP is answered as other errors are.

    Attributes:
        limits: of the server; set by `protocol_class`.
    """

    limits: ServeConfig
    _timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + EXTRA_CONNECTIONS:
            transport.close()
            return
        self._timer = self.loop.call_later(self.limits.idle_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        first = self._answering is False and not self.conn.trailing_data[0]
        super().data_received(data)
        if self._answering:
            self._cancel_timer()
        elif first:
            self._cancel_timer()
            self._timer = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended."""
        self._cancel_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        self._reader_timer = self.loop.call_later(self.limits.request_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not a request; called while h11's error is handled."""
        error = sys.exc_info()[1]
        hint = getattr(error, "error_status_hint", 400)
        if hint == 431:
            self._refuse(APIError(431, "the request's head is too large", expected=f"at most {HEAD_BYTES} bytes"))
        else:
            self._refuse(APIError(400, f"not an HTTP request: {error}", expected="METHOD /path HTTP/1.1"))

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _head_is_late(self) -> None:
        if not self._answering and not self.transport.is_closing():
            expected = f"within {self.limits.header_seconds:g} s"
            self._refuse(APIError(408, "the request's head did not arrive in time", expected=expected))

    def _refuse(self, error: APIError) -> None:
        body = to_json(error.to_json(), ascii_only=True).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol_class(limits: ServeConfig) -> type[LimitedProtocol]:
    """The protocol with the limits of a server, as uvicorn wants it."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
