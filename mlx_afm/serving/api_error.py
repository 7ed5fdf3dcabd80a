"""What a client is told instead of an answer, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
        headers: of the response besides.
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
        headers: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> None:
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})
        if retry_seconds is not None:
            self.headers["Retry-After"] = str(retry_seconds)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        super().__init__(what, **facts)

    def to_json(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        APIError: not UTF-8, not JSON (also NaN and Infinity, which JSON has not), nested too deeply, or not an object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise APIError(400, "the body is not UTF-8", code="invalid_json", where=f"byte {error.start}") from error
    except RecursionError as error:
        raise APIError(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:  # also a number of thousands of digits
        raise APIError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise APIError(400, "the body is not a JSON object", code="invalid_json", found=kind(value))
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def invalid_fields(faults: Sequence[tuple[str, str]]) -> APIError:
    """One refusal for the faults of all fields: each a path such as `messages[0].content`, and what is wrong there."""
    details = [f"{path}: {what}" for path, what in faults]
    what = details[0] if len(details) == 1 else f"{len(details)} fields cannot be used"
    more = details if len(details) > 1 else []
    return APIError(400, what, code="invalid_value", param=faults[0][0], details=more)


def kind(value: object) -> str:
    """The JSON type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value as a message shows it, cut short."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a number of very many digits"
    if isinstance(value, (dict, list, bytes)):
        return f"an {kind(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
