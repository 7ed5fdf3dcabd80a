"""What the routes share, and the way of a completion: from its request to events of the model's thread and back."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_afm.serving.access import JSONResponse
from mlx_afm.serving.adapters_api import Adapters
from mlx_afm.serving.answers import AnswerBuilder
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import Delta, End, Event, Failure, Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.model_thread import ModelThread
from mlx_afm.serving.plan import plan_jobs, require_model
from mlx_afm.serving.requests import CompletionRequest, Reader
from mlx_afm.serving.responses import ResponseBuilder
from mlx_afm.serving.scheduler_metrics import Sample, SchedulerCollector, scheduler_samples
from mlx_afm.text.token_names import TokenNames

T = TypeVar("T")
Builder = AnswerBuilder | ResponseBuilder


class Server:
    """What the routes share.

    Args:
        thread: owns the model.
        config: limits.
        metrics: what is counted.

    Attributes:
        stopping: no new requests are taken.
        connections: how many are open; set once there is a listener.
    """

    def __init__(self, thread: ModelThread, config: ServeConfig, metrics: Metrics) -> None:
        self.thread, self.config, self.metrics = thread, config, metrics
        self.reader = Reader(thread.tokenizer, config, thread.vocabulary, thread.system_prompt)
        self.names, self.adapters = TokenNames(thread.tokenizer), Adapters(thread, config)
        self.created = int(time.time())
        self.stopping = False
        self.connections: Callable[[], int] = lambda: 0
        self._samples: tuple[list[Sample], list[Sample]] = ([], [])
        self._mailbox = Mailbox(asyncio.get_running_loop())
        metrics.registry.register(SchedulerCollector(lambda: self._samples))  # type: ignore[arg-type]

    def card(self, name: str) -> dict[str, Any]:
        """A model id as /v1/models tells it."""
        base = self.thread.model_id
        require_model(name, base, self.thread.adapters)
        parent, limit = None if name == base else base, self.config.context_tokens
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx-afm"}
        return {**card, "root": name, "parent": parent, "max_model_len": limit}

    async def metrics_text(self) -> bytes:
        """All metrics, for Prometheus."""
        counters, gauges = await asyncio.wrap_future(self.thread.call(scheduler_samples))
        self._samples = counters, [*gauges, ("connections", "Open connections.", self.connections())]
        return generate_latest(self.metrics.registry)

    async def complete(
        self, request: Request, read: Callable[[], CompletionRequest], build: Callable[[CompletionRequest], Builder]
    ) -> Response:
        """Answers a request for a completion.

        Args:
            request: watched, so that a client which hangs up frees its rows.
            read: gives what the request asks for; long texts and schemas take a while, so a thread runs it.
            build: makes what puts the answer together.

        Raises:
            APIError: there is no answer. ClientDisconnect: nobody waits for it.
        """
        events = asyncio.Queue[Event]()
        deadline = time.monotonic() + self.config.request_seconds
        post = partial(self._mailbox.post, events)

        def plan() -> tuple[CompletionRequest, list[Job]]:
            asked = read()
            adapter = require_model(asked.model, self.thread.model_id, self.thread.adapters)
            jobs = plan_jobs(asked, adapter, self.thread.tokenizer, self.config, self.metrics, post, deadline)
            return asked, jobs

        asked, jobs = await asyncio.to_thread(plan)
        builder, streams = build(asked), False

        def cancel() -> None:
            for job in jobs:
                self.thread.cancel(job)

        try:
            for job in jobs:
                self.thread.submit(job)
            # The first event of a stream too: until then errors have a status.
            first = await _unless_hung_up(request, _next(events))
            if asked.stream:
                streams = True
                return EventStream(_stream(builder, jobs, first, events), cancel)
            return JSONResponse(await _unless_hung_up(request, _whole(builder, jobs, first, events)))
        finally:
            if not streams:
                cancel()


class Mailbox:
    """Events from the model's thread to the loop, which is woken once for all that come together.

    Args:
        loop: that waits for them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._held = loop, deque[tuple[asyncio.Queue[Event], Event]]()

    def post(self, events: asyncio.Queue[Event], event: Event) -> None:
        """Puts an event into a queue of the loop; for the thread that owns the model alone."""
        self._held.append((events, event))
        if len(self._held) == 1:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._held:
            events, event = self._held[0]
            events.put_nowait(event)
            self._held.popleft()


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        content: the events.
        close: called at the end, also if the client hung up before the first event was sent.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _next(events: asyncio.Queue[Event]) -> Delta | End:
    event = await events.get()
    if isinstance(event, Failure):
        raise event.error
    return event


async def _stream(
    builder: Builder, jobs: list[Job], event: Delta | End, events: asyncio.Queue[Event]
) -> AsyncIterator[bytes]:
    yield b"".join(builder.first_events())
    try:
        while True:
            if sent := b"".join(builder.events(event)):
                yield sent
            if builder.complete:
                break
            event = await _next(events)
    except APIError as error:  # too late for a status
        yield b"".join(builder.error_events(error))
        return
    builder.cached_tokens = sum(job.cached_tokens for job in jobs)
    yield b"".join(builder.last_events())


async def _whole(builder: Builder, jobs: list[Job], event: Delta | End, events: asyncio.Queue[Event]) -> dict[str, Any]:
    while True:
        list(builder.events(event))
        if builder.complete:
            builder.cached_tokens = sum(job.cached_tokens for job in jobs)
            return builder.whole()
        event = await _next(events)


async def _unless_hung_up(request: Request, work: Awaitable[T]) -> T:
    """What some work gives; ClientDisconnect if the client goes first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
