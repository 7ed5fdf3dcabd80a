"""Adapters added and removed while the server runs, from this machine alone and from allowed folders alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request

from mlx_afm.errors import AFMError
from mlx_afm.files import to_path
from mlx_afm.serving.access import names_this_machine
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig, is_loopback
from mlx_afm.serving.model_thread import ModelThread


class Adapters:
    """Those of a server.

    Args:
        thread: that owns them.
        config: `admin_roots` says where adapters may come from; without any, all this is off.

    All methods raise APIError for what is switched off, comes from elsewhere, or is not possible.
    """

    def __init__(self, thread: ModelThread, config: ServeConfig) -> None:
        self._thread, self._config = thread, config

    async def list(self, request: Request) -> list[dict[str, Any]]:
        """Name, path, bytes and use of each."""
        self._require_local(request)
        return await asyncio.wrap_future(self._thread.call(lambda scheduler: scheduler.pool.state()))

    async def add(self, request: Request, name: str, path: str) -> int:
        """Makes an adapter known; returns its bytes in memory."""
        self._require_local(request)
        place = self._allowed(path)
        try:
            entry = await asyncio.wrap_future(self._thread.call(lambda s: s.pool.register(name, place)))
        except (AFMError, OSError) as error:
            taken = name in (self._thread.model_id, *self._thread.adapters)
            raise APIError(409 if taken else 400, str(error), code="not_added") from error
        self._thread.warn_of(entry)
        return entry.size_bytes

    async def remove(self, request: Request, name: str) -> None:
        """Forgets an adapter; answers under way keep it until they end."""
        self._require_local(request)
        if not await asyncio.wrap_future(self._thread.call(lambda s: s.pool.unregister(name))):
            expected = ", ".join(self._thread.adapters) or "none are there"
            raise APIError(404, "no such adapter", code="not_found", expected=expected, found=repr(name[:80]))

    def _require_local(self, request: Request) -> None:
        if not self._config.admin_roots:
            advice = "Start the server with --admin-root FOLDER."
            raise APIError(403, "adapters cannot be changed at run time", code="admin_off", advice=advice)
        peer = "" if request.client is None else request.client.host
        if not is_loopback(peer) or not names_this_machine(request.headers.get("host", "")):
            raise APIError(403, "only this machine may change adapters", code="admin_local")

    def _allowed(self, text: str) -> Path:
        """The path, links resolved, if it lies below an allowed folder."""
        try:
            place = to_path(text).resolve()
            allowed = any(root.resolve() in place.parents for root in self._config.admin_roots)
        except (OSError, RuntimeError, ValueError) as error:
            raise APIError(400, "not a path", param="path") from error
        if not allowed:
            advice = "Start the server with --admin-root for that folder."
            what = "not below a folder that adapters may come from"
            raise APIError(403, what, param="path", code="admin_path", advice=advice)
        return place
