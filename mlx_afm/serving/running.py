"""Starting and stopping: in the foreground until a signal, or in threads beside other code."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.files import to_path, visible
from mlx_afm.serving.access import Access, RequestBody
from mlx_afm.serving.app import make_app
from mlx_afm.serving.bodies import ADAPTER_NAME
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.model_thread import ModelThread
from mlx_afm.serving.protocol import HEAD_BYTES, protocol_class
from mlx_afm.serving.scheduler import Log
from mlx_afm.serving.server import Server

SUFFIXES = (".pt", ".fmadapter")
SETTLE_SECONDS = 0.2
FINISH_SECONDS = 2
BACKLOG = 2048


@dataclass(frozen=True)
class Running:
    """A server that listens.

    Attributes:
        url: without a path.
        models: ids that can be asked for, the base first.
        model: the thread that owns it.
        stop: ends it; requests under way have `grace_seconds`.
    """

    url: str
    models: tuple[str, ...]
    model: ModelThread
    stop: Callable[[], None]


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """Adapters in a folder by name: each folder with an `adapter_config.json`, each `.pt` and `.fmadapter`.

    Hidden files and folders are passed over.

    Raises:
        ConfigError: no such folder, none in it, or two of the same name.
    """
    folder = to_path(folder)
    if not folder.is_dir():
        raise ConfigError("no such folder", where=folder, expected="a folder of adapters")
    found: dict[str, Path] = {}
    for path in visible(folder.iterdir()):
        if path.suffix in SUFFIXES or (path / "adapter_config.json").is_file():
            name = path.stem if path.suffix in SUFFIXES else path.name
            if name in found:
                raise ConfigError(
                    "two adapters of the same name", where=folder, found=f"{found[name].name}, {path.name}"
                )
            found[name] = path
    if not found:
        expected = f"folders with adapter_config.json, or files ending in {' or '.join(SUFFIXES)}"
        raise ConfigError("no adapters here", where=folder, expected=expected)
    return found


@contextmanager
def running(
    model: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    config: ServeConfig | None = None,
    log: Log | None = None,
) -> Iterator[Running]:
    """A server in threads of its own, stopped at the end of the block.

    Args:
        model: an MLX model folder.
        adapters: by the id that clients ask for.
        config: settings; port 0 takes a free one.
        log: takes what went wrong inside.

    Raises:
        AFMError: the model or an adapter cannot be served. OSError: the port is taken.
    """
    started: Future[Running] = Future()

    def run() -> None:
        # Whatever keeps it from starting is for the caller.
        try:
            asyncio.run(serve(model, adapters or {}, config or ServeConfig(), started.set_result, log))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="mlx-afm-http", daemon=True)
    thread.start()
    try:
        yield started.result()
    finally:
        if started.exception() is None:
            started.result().stop()
        thread.join()
        settle()


def settle() -> None:
    """Gives threads that were joined the time to end for the system as well; to be called before a program ends.

    MLX (0.32) holds compiled functions for each thread and lets go of them there, behind Python's back. In an
    interpreter that is ending by then they cannot be let go of, and the process is aborted: one in thirty on a busy
    machine.
    """
    time.sleep(SETTLE_SECONDS)


async def serve(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    config: ServeConfig,
    ready: Callable[[Running], object],
    log: Log | None = None,
    *,
    signals: bool = False,
) -> None:
    """Serves until it is told to stop.

    Args:
        model, adapters, config, log: see `running`.
        ready: told once the server listens.
        signals: stop at SIGINT or SIGTERM; a second one does not wait for requests under way.

    Raises:
        AFMError: the model or an adapter cannot be served. OSError: the port is taken.
    """
    metrics, log = Metrics(), log or (lambda text: None)
    stop, hurry, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()
    thread = await asyncio.to_thread(ModelThread, model, _checked(adapters), config, metrics, log)
    try:
        server = Server(thread, config, metrics)
        listener = _Listener(_layers(server, log), config)
        server.connections = lambda: len(listener.server_state.connections)
        listening = _listening_socket(config.host, config.port)
        for number in (signal.SIGINT, signal.SIGTERM) if signals else ():
            loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
        serving = asyncio.ensure_future(listener.serve([listening]))
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        ready(Running(url, (thread.model_id, *thread.adapters), thread, partial(_from_anywhere, loop, stop.set)))
        await stop.wait()
        # New requests are refused while those under way finish, so the port stays open until they have.
        server.stopping = True
        await _first(asyncio.to_thread(thread.stop, config.grace_seconds), hurry.wait())
        await asyncio.to_thread(thread.stop, 0.0)
        listener.should_exit = True
        await serving
    finally:
        await asyncio.to_thread(thread.stop, 0.0)


class _Listener(uvicorn.Server):
    """uvicorn, whose signals and life are ours."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_class(config),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_keep_alive=config.idle_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=FINISH_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def _layers(server: Server, log: Log) -> ASGIApp:
    """The routes and what stands around them, see `access`."""
    config, app = server.config, make_app(server)
    inner: ASGIApp = RequestBody(app, config, log)
    if config.allow_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=config.allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
        )
    return Access(inner, config, server.metrics, app.openapi()["paths"], lambda: server.connections())


def _listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. It names TCP: else asyncio leaves Nagle's algorithm on, and answers wait for 40 ms."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


async def _first(*waiting: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(one) for one in waiting]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _from_anywhere(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # it has stopped already
        loop.call_soon_threadsafe(action)


def _checked(adapters: Mapping[str, str | Path]) -> dict[str, Path]:
    wrong = [name for name in adapters if not re.fullmatch(ADAPTER_NAME, name)]
    if wrong:
        expected, found = "letters, digits and . _ : - (up to 128)", ", ".join(map(repr, wrong))
        raise AdapterError("an adapter's name cannot be a model id", expected=expected, found=found)
    return {name: to_path(path) for name, path in adapters.items()}
