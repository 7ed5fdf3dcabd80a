"""The routes of the server, and what their faults become."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from mlx_afm.assets.page import PAGE
from mlx_afm.serving.access import HUNG_UP, JSONResponse, error_response
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
from mlx_afm.serving.responses import ResponseBuilder, read_response
from mlx_afm.serving.server import Server
from mlx_afm.serving.tokens_api import detokenize, tokenize, tokenizer_info
from mlx_afm.serving.validation import field_errors

JSON_HEADER = (b"content-type", b"application/json")
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
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=HUNG_UP))
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
