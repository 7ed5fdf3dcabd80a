"""A request's JSON, read field by field: right types and ranges, or one refusal that lists every fault."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mlx_afm.serving.api_error import APIError
from mlx_afm.spelling import nearest_name


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a body.

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


def kind(value: object) -> str:
    """The JSON type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


class Fields:
    """Reads fields of an object; `done` raises what was wrong with any of them. null is as good as absent.

    Args:
        values: the object.
        known: every field there may be.
    """

    def __init__(self, values: Mapping[str, Any], known: Collection[str]) -> None:
        self._values, self._faults = values, list[tuple[str, str]]()
        for name in values:
            if name not in known:
                near = nearest_name(name, known)
                self.fault(name[:80], f"not a field of this request{f'; did you mean {near}?' if near else ''}")

    def fault(self, name: str, what: str) -> None:
        """Notes a fault of a field."""
        self._faults.append((name, what))

    def done(self) -> None:
        """Raises APIError if there were faults."""
        if not self._faults:
            return
        details = [f"{name}: {what}" for name, what in self._faults]
        what = details[0] if len(details) == 1 else f"{len(details)} fields cannot be used"
        more = details if len(details) > 1 else []
        raise APIError(400, what, code="invalid_value", param=self._faults[0][0], details=more)

    def value(self, name: str) -> Any:
        """A field as it is; None if absent."""
        return self._values.get(name)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number from low to high."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.fault(name, f"expected a number from {low:g} to {high:g}, found {shown(value)}")
            return default
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from low to high."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fault(name, f"expected a whole number from {low} to {high}, found {shown(value)}")
            return default
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(name, f"expected true or false, found {shown(value)}")
            return default
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or a list of some; none of them empty."""
        value = self._values.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(t, str) and t for t in found):
            self.fault(name, f"expected a string or up to {most} strings, none of them empty, found {shown(value)}")
            return ()
        return tuple(found)

    def only(self, name: str, *allowed: Any) -> None:
        """Notes a fault unless a field is absent or has one of the values that change nothing."""
        value = self._values.get(name)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            others = f"; only {' or '.join(map(json.dumps, allowed))} is" if allowed else ""
            self.fault(name, f"{shown(value)} is not supported{others}")


def shown(value: Any) -> str:
    """A value as a message shows it, cut short."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a number of very many digits"
    if isinstance(value, (dict, list)):
        return f"an {kind(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
