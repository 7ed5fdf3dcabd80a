"""Who may ask."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig, is_loopback
from mlx_afm.serving.http import Request


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
