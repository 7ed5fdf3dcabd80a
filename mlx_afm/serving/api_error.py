"""What a client is told instead of an answer, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from mlx_afm.errors import AFMError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(AFMError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        what: the reason, for people.
        code: the reason, for programs.
        param: which field it is about.
        retry_seconds: after how long to try again.
        facts: see `AFMError`.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int | None = None,
        **facts: Any,
    ) -> None:
        self.status, self.code, self.param, self.retry_seconds = status, code, param, retry_seconds
        super().__init__(what, **facts)

    def to_json(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What the response carries besides."""
        headers = {} if self.retry_seconds is None else {"Retry-After": str(self.retry_seconds)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
