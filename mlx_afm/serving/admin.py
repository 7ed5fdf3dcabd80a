"""Adapters added and removed while the server runs, from this machine alone and from allowed folders alone."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mlx_afm.errors import AFMError
from mlx_afm.files import to_path
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig, is_loopback
from mlx_afm.serving.fields import Fields, parse_json
from mlx_afm.serving.http import Request, names_this_machine
from mlx_afm.serving.model_thread import ModelThread

PATH = "/admin/adapters"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Admin:
    """GET and POST /admin/adapters, DELETE /admin/adapters/NAME.

    Args:
        thread: whose adapters.
        config: `admin_roots` says where adapters may come from; without any, all this is off.
    """

    def __init__(self, thread: ModelThread, config: ServeConfig) -> None:
        self._thread, self._config = thread, config

    async def answer(self, request: Request) -> dict[str, Any]:
        """What to tell a request.

        Raises:
            APIError: switched off, from elsewhere, or not possible.
        """
        self._require_local(request)
        if request.path == PATH and request.method == "GET":
            return {"adapters": await asyncio.wrap_future(self._thread.call(lambda s: s.pool.state()))}
        if request.path == PATH and request.method == "POST":
            return await self._add(request)
        if request.path.startswith(f"{PATH}/") and request.method == "DELETE":
            return await self._remove(unquote(request.path.removeprefix(f"{PATH}/")))
        raise APIError(404, "no such path", expected=f"GET or POST {PATH}, DELETE {PATH}/NAME", code="not_found")

    def _require_local(self, request: Request) -> None:
        if not self._config.admin_roots:
            advice = "Start the server with --admin-root FOLDER."
            raise APIError(403, "adapters cannot be changed at run time", code="admin_off", advice=advice)
        # A web page can send plain forms here from the user's browser; JSON it cannot without being asked first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not is_loopback(request.peer) or not names_this_machine(request):
            raise APIError(403, "only this machine may change adapters", code="admin_local")
        if request.method == "POST" and kind != "application/json":
            raise APIError(415, "adapters are added with JSON", expected="Content-Type: application/json")

    async def _add(self, request: Request) -> dict[str, Any]:
        fields = Fields(parse_json(request.body), ("name", "path"))
        name, path = fields.value("name"), fields.value("path")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            fields.fault("name", "expected letters, digits and . _ : - (up to 128)")
        if not isinstance(path, str) or not path or "\0" in path:
            fields.fault("path", "expected a path")
        fields.done()
        place = self._allowed(str(path))
        try:
            entry = await asyncio.wrap_future(self._thread.call(lambda s: s.pool.register(str(name), place)))
        except (AFMError, OSError) as error:
            taken = name in (self._thread.model_id, *self._thread.adapters)
            raise APIError(409 if taken else 400, str(error), code="not_added") from error
        self._thread.warn_of(entry)
        return {"name": name, "bytes": entry.size_bytes}

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

    async def _remove(self, name: str) -> dict[str, Any]:
        if not await asyncio.wrap_future(self._thread.call(lambda s: s.pool.unregister(name))):
            expected = ", ".join(self._thread.adapters) or "none are there"
            raise APIError(404, "no such adapter", code="not_found", expected=expected, found=repr(name[:80]))
        return {"name": name, "removed": True}
