"""The routes: each request to what the model's thread makes of it, and back."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_afm.assets.page import PAGE
from mlx_afm.serving.access import JSONResponse, error_response
from mlx_afm.serving.adapters_api import Adapters
from mlx_afm.serving.answers import AnswerBuilder
from mlx_afm.serving.api_error import APIError, parse_json
from mlx_afm.serving.bodies import (
    AdapterBody,
    ChatBody,
    DetokenizeBody,
    LoadAdapterBody,
    ResponsesBody,
    TextBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import Delta, End, Event, Failure, Job
from mlx_afm.serving.metrics import Metrics, Sample, SchedulerCollector, scheduler_samples
from mlx_afm.serving.model_thread import ModelThread
from mlx_afm.serving.plan import plan_jobs, require_model
from mlx_afm.serving.requests import CompletionRequest, Reader
from mlx_afm.serving.responses import ResponseBuilder, read_response
from mlx_afm.serving.tokens_api import detokenize, tokenize, tokenizer_info
from mlx_afm.serving.validation import field_errors
from mlx_afm.text.token_names import TokenNames

T = TypeVar("T")
JSON_HEADER = (b"content-type", b"application/json")
Builder = AnswerBuilder | ResponseBuilder
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is refused, see `error`."},
    "5XX": {"description": "See `error`."},
}


class JSONBodyRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler, given such requests."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                _require_json(request)
            # FastAPI goes by this header; one that is left out means JSON too.
            headers = [*(pair for pair in request.scope["headers"] if pair[0] != b"content-type"), JSON_HEADER]
            return await handler(_JSONRequest({**request.scope, "headers": headers}, request.receive))

        return handle


class _JSONRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


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


def _require_json(request: Request) -> None:
    given = request.headers.get("content-type", "application/json")
    if given.partition(";")[0].strip().lower() != "application/json":
        expected, found = "Content-Type: application/json", repr(given[:80])
        raise APIError(415, "the body must be JSON", expected=expected, found=found)


def make_app(server: Server) -> FastAPI:
    """The routes of a server."""
    # Swagger's files come from here, not from another server.
    make = (
        partial(FastAPIOffline, static_url="/docs/static") if server.config.docs else partial(FastAPI, openapi_url=None)
    )
    app = make(title="mlx-afm", redoc_url=None)
    app.include_router(_completions(server))
    app.include_router(_models(server))
    app.include_router(_tokens(server))
    app.include_router(_adapters(server))
    if server.config.page:
        app.add_api_route("/", lambda: FileResponse(PAGE, media_type="text/html"), include_in_schema=False)
    app.add_exception_handler(APIError, lambda request, error: error_response(error))  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _refused_by_router)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=499))
    return app


def _completions(server: Server) -> APIRouter:
    router, reader = APIRouter(route_class=JSONBodyRoute, responses=ERRORS), server.reader

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """An answer in a conversation."""
        return await server.complete(
            request, lambda: reader.chat(body), lambda asked: AnswerBuilder(asked, server.names)
        )

    @router.post("/v1/completions")
    async def completions(request: Request, body: TextBody) -> Response:
        """Texts that are continued, and log probabilities of given texts."""
        return await server.complete(
            request, lambda: reader.text(body), lambda asked: AnswerBuilder(asked, server.names)
        )

    @router.post("/v1/responses")
    async def responses(request: Request, body: ResponsesBody) -> Response:
        """An answer in a conversation, in the form of the Responses API; nothing is stored."""
        return await server.complete(
            request, lambda: read_response(body, reader), lambda asked: ResponseBuilder(body, asked, server.names)
        )

    return router


def _models(server: Server) -> APIRouter:
    router = APIRouter(route_class=JSONBodyRoute, responses=ERRORS)

    @router.get("/v1/models")
    async def models() -> Response:
        """The base and every adapter."""
        names = (server.thread.model_id, *server.thread.adapters)
        return JSONResponse({"object": "list", "data": [server.card(name) for name in names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        return JSONResponse(server.card(name))

    @router.get("/health", responses={503: {"description": "The server is stopping."}})
    async def health() -> Response:
        """Whether requests are taken."""
        state = "stopping" if server.stopping else "ok"
        return JSONResponse({"status": state}, 503 if server.stopping else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await server.metrics_text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _tokens(server: Server) -> APIRouter:
    router = APIRouter(route_class=JSONBodyRoute, responses=ERRORS)

    @router.post("/tokenize")
    async def tokenize_text(body: TokenizeBody) -> Response:
        """Ids of a text or a conversation."""
        return JSONResponse(await asyncio.to_thread(tokenize, body, server.reader, server.names))

    @router.post("/detokenize")
    async def detokenize_ids(body: DetokenizeBody) -> Response:
        """The text of ids."""
        return JSONResponse(detokenize(body, server.reader))

    @router.get("/tokenizer_info")
    async def info() -> Response:
        """Of the model's tokenizer."""
        return JSONResponse(tokenizer_info(server.reader))

    return router


def _adapters(server: Server) -> APIRouter:
    router, adapters = APIRouter(route_class=JSONBodyRoute, responses=ERRORS), server.adapters

    @router.get("/admin/adapters")
    async def list_adapters(request: Request) -> Response:
        """Name, path, bytes and use of each."""
        return JSONResponse({"adapters": await adapters.list(request)})

    @router.post("/admin/adapters")
    async def add_adapter(request: Request, body: AdapterBody) -> Response:
        """Adds one from a folder that is allowed."""
        return JSONResponse({"name": body.name, "bytes": await adapters.add(request, body.name, body.path)})

    @router.delete("/admin/adapters/{name:path}")
    async def remove_adapter(request: Request, name: str) -> Response:
        """Removes one; answers under way keep it."""
        await adapters.remove(request, name)
        return JSONResponse({"name": name, "removed": True})

    @router.post("/v1/load_lora_adapter", response_class=Response)
    async def load_lora_adapter(request: Request, body: LoadAdapterBody) -> Response:
        """The same as POST /admin/adapters, as vLLM has it."""
        await adapters.add(request, body.lora_name, body.lora_path)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @router.post("/v1/unload_lora_adapter", response_class=Response)
    async def unload_lora_adapter(request: Request, body: UnloadAdapterBody) -> Response:
        """The same as DELETE /admin/adapters/NAME, as vLLM has it."""
        await adapters.remove(request, body.lora_name)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    return router


def _invalid(request: Request, error: RequestValidationError) -> Response:
    """A body that does not fit its model."""
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    model = None if field is None else field.field_info.annotation
    faults = [{**fault, "loc": fault["loc"][1:]} for fault in error.errors()]
    return error_response(field_errors(faults, error.body, model))


def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours, which goes on to `RequestBody` and its log."""
    return error_response(APIError(500, "the server could not answer", code="internal_error"))


def _refused_by_router(request: Request, error: HTTPException) -> Response:
    """No such path, a wrong method, or a body that is no JSON."""
    if isinstance(error.__cause__, APIError):
        return error_response(error.__cause__)
    if error.status_code != 405:
        found = request.url.path[:80]
        return error_response(APIError(404, "no such path", code="not_found", expected="see /docs", found=found))
    path = getattr(request.scope.get("route"), "path", "").replace(":path}", "}")
    methods = {name.upper() for name in request.app.openapi()["paths"].get(path, ("get",))}
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
    refusal = APIError(405, "wrong method", expected=allowed, found=request.method, headers={"Allow": allowed})
    return error_response(refusal)
