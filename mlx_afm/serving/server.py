"""The server: connections to requests to the model's thread and back."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import mlx.core as mx

from mlx_afm.serving.admin import Admin
from mlx_afm.serving.answers import AnswerBuilder, TokenNames
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.fields import parse_json
from mlx_afm.serving.http import Closed, Connection, Request, require_allowed
from mlx_afm.serving.jobs import Delta, End, Event, Failure, Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.model_thread import ModelThread
from mlx_afm.serving.plan import plan_jobs, require_model
from mlx_afm.serving.requests import CompletionRequest, Reader
from mlx_afm.serving.scheduler import Log, Scheduler

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
METHODS = {CHAT: "POST", TEXT: "POST", MODELS: "GET", "/health": "GET", "/metrics": "GET"}
FINISH_SECONDS = 2.0
EXTRA_CONNECTIONS = 16  # beyond the limit, that are told so


class Server:
    """Answers HTTP with one model.

    Args:
        thread: owns the model.
        config: limits.
        metrics: what is counted.
        log: takes what went wrong inside.
    """

    def __init__(self, thread: ModelThread, config: ServeConfig, metrics: Metrics, log: Log) -> None:
        self._thread, self._config, self._metrics, self._log = thread, config, metrics, log
        self._reader = Reader(thread.tokenizer, config, thread.vocabulary, thread.system_prompt)
        self._names = TokenNames(thread.tokenizer)
        self._admin = Admin(thread, config)
        self._created = int(time.time())
        self._tasks: set[asyncio.Task[Any]] = set()
        self._busy = 0
        self.stopping = False
        self.model_id = thread.model_id

    async def handle(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection until it ends."""
        connection, task = Connection(stream, writer, self._config), asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        linger = False
        try:
            while await self._next(connection):
                pass
        except APIError as error:  # not a request
            linger = True
            self._metrics.request("other", error.status)
            with suppress(Closed):
                await connection.respond(error.status, error.to_json(), error.headers(), keep_alive=False)
        except (Closed, asyncio.CancelledError):  # `finish` cancels what is idle, and nobody waits for this task
            pass
        finally:
            self._tasks.discard(task)
            await connection.close(linger=linger)

    async def finish(self) -> None:
        """Lets answers that are there be sent, and ends all connections."""
        end = time.monotonic() + FINISH_SECONDS
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _next(self, connection: Connection) -> bool:
        """Answers the next request; whether there may be another."""
        if len(self._tasks) > self._config.connections + EXTRA_CONNECTIONS:
            return False
        request = await connection.read_request()
        if request is None:
            return False
        keep = request.keep_alive and not self.stopping
        path = request.path if request.path in METHODS or request.path.startswith("/admin/") else "other"
        path = "/admin" if path.startswith("/admin/") else path
        status = 200
        self._busy += 1
        try:
            await self._answer(connection, request, keep)
        except APIError as error:
            status = error.status
            if connection.streaming:  # too late for a status
                await connection.send_event(error.to_json())
                await connection.end_events()
            else:
                await connection.respond(status, error.to_json(), error.headers(), keep_alive=keep)
        except Closed:
            status = 499
            raise
        finally:
            self._busy -= 1
            self._metrics.request(path, status)
        return keep

    async def _answer(self, connection: Connection, request: Request, keep: bool) -> None:
        # A fault of ours must reach its client as such, and no other: this is the edge of the server.
        try:
            await self._route(connection, request, keep)
        except (APIError, Closed):
            raise
        except Exception as error:
            self._log(f"{request.method} {request.path[:80]}: {type(error).__name__}: {error}")
            raise APIError(500, "the server could not answer", code="internal_error") from error

    async def _route(self, connection: Connection, request: Request, keep: bool) -> None:
        if len(self._tasks) > self._config.connections:
            raise APIError(503, "too many connections", code="too_many_connections", retry_seconds=1)
        path, method = request.path, request.method
        require_allowed(request, self._config)
        if path.startswith("/admin/"):
            await connection.respond(200, await self._admin.answer(request), keep_alive=keep)
            return
        if path.startswith(f"{MODELS}/") and method == "GET":
            await connection.respond(200, self._model(unquote(path.removeprefix(f"{MODELS}/"))), keep_alive=keep)
            return
        if path not in METHODS:
            raise APIError(404, "no such path", code="not_found", expected=", ".join(METHODS), found=path[:80])
        if method != METHODS[path]:
            raise APIError(405, "wrong method", expected=METHODS[path], found=method)
        if path in (CHAT, TEXT):
            await self._complete(connection, request, keep)
        elif path == MODELS:
            models = [self._model(name) for name in (self.model_id, *self._thread.adapters)]
            await connection.respond(200, {"object": "list", "data": models}, keep_alive=keep)
        elif path == "/metrics":
            await connection.respond(200, await self._metrics_text(), keep_alive=keep)
        else:
            status = "stopping" if self.stopping else "ok"
            await connection.respond(503 if self.stopping else 200, {"status": status}, keep_alive=keep)

    def _model(self, name: str) -> dict[str, Any]:
        require_model(name, self.model_id, self._thread.adapters)
        card: dict[str, Any] = {"id": name, "object": "model", "created": self._created, "owned_by": "mlx-afm"}
        return {**card, "parent": None if name == self.model_id else self.model_id}

    async def _metrics_text(self) -> str:
        def look(scheduler: Scheduler) -> tuple[dict[str, tuple[float, str]], dict[str, tuple[float, str]]]:
            steps = scheduler.pool.decoder.counters
            counters: dict[str, tuple[float, str]] = {
                "plain_steps": (steps.plain_steps, "Forward passes that gave rows a token, not compiled."),
                "compiled_steps": (steps.compiled_steps, "Compiled forward passes that gave rows a token."),
                "traces": (steps.traces, "Times that the compiled step was traced."),
            }
            if (speculation := scheduler.speculation) is not None:
                counters["draft_tokens"] = speculation.drafted, "Tokens that the draft model proposed."
                counters["accepted_draft_tokens"] = speculation.accepted, "Proposed tokens that were accepted."
            return counters, {
                "rows": (scheduler.rows_in_use, "Answers under way."),
                "waiting": (len(scheduler.waiting), "Requests that wait."),
                "adapter_bytes": (scheduler.pool.held_bytes, "Memory of adapters."),
                "prefix_bytes": (scheduler.prefixes.held_bytes, "Memory of kept beginnings of prompts."),
                "prefix_hits": (scheduler.prefixes.hits, "Prompts whose beginning was not computed again."),
                "prefix_misses": (scheduler.prefixes.misses, "Prompts whose beginning was."),
                "active_memory_bytes": (mx.get_active_memory(), "Memory of MLX's arrays."),
                "peak_memory_bytes": (mx.get_peak_memory(), "The most that was ever."),
                "cache_memory_bytes": (mx.get_cache_memory(), "Memory that MLX keeps for reuse."),
            }

        counters, gauges = await asyncio.wrap_future(self._thread.call(look))
        return self._metrics.text({**gauges, "connections": (len(self._tasks), "Open connections.")}, counters)

    # Completions.

    async def _complete(self, connection: Connection, request: Request, keep: bool) -> None:
        deadline = time.monotonic() + self._config.request_seconds
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        def plan() -> tuple[CompletionRequest, list[Job]]:
            read = self._reader.chat if request.path == CHAT else self._reader.text
            asked = read(parse_json(request.body))
            adapter = require_model(asked.model, self.model_id, self._thread.adapters)
            tokenizer = self._thread.tokenizer
            return asked, plan_jobs(asked, adapter, tokenizer, self._config, self._metrics, post, deadline)

        # Long texts and schemas take a while, and others are waiting.
        asked, jobs = await asyncio.to_thread(plan)
        try:
            for job in jobs:
                self._thread.submit(job)
            builder = AnswerBuilder(asked, self._names)
            async with Incoming(connection, events) as incoming:
                if asked.stream:
                    await self._stream(connection, builder, incoming, keep)
                else:
                    while not builder.complete:
                        list(builder.take(await incoming.next()))
            builder.cached_tokens = sum(job.cached_tokens for job in jobs)
            if asked.stream:
                if asked.usage:
                    await connection.send_event(builder.usage_chunk())
                await connection.send_event("[DONE]")
                await connection.end_events()
            else:
                await connection.respond(200, builder.whole(), keep_alive=keep)
        finally:
            for job in jobs:
                self._thread.cancel(job)

    async def _stream(self, connection: Connection, builder: AnswerBuilder, incoming: Incoming, keep: bool) -> None:
        """Sends chunks until every choice is complete."""
        while not builder.complete:
            event = await incoming.next()
            if not connection.streaming:  # not before something is there: until then errors have a status
                await connection.start_events(keep_alive=keep)
                for chunk in builder.first_chunks():
                    await connection.send_event(chunk)
            for chunk in builder.take(event):
                await connection.send_event(chunk)


class Incoming:
    """Events as they come, for as long as the client is there."""

    def __init__(self, connection: Connection, events: asyncio.Queue[Event]) -> None:
        self._connection, self._events = connection, events

    async def __aenter__(self) -> Incoming:
        self._watch = asyncio.ensure_future(self._connection.hung_up())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._watch.cancel()
        await asyncio.wait((self._watch,))

    async def next(self) -> Delta | End:
        """The next event.

        Raises:
            Closed: the client is gone. APIError: there is no answer.
        """
        coming = asyncio.ensure_future(self._events.get())
        await asyncio.wait((coming, self._watch), return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            coming.cancel()
            raise Closed
        event = coming.result()
        if isinstance(event, Failure):
            raise event.error
        return event
