"""What a `response_format` asks for, and its schema in the order in which an answer writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_afm.errors import ConfigError
from mlx_afm.text.json_schema import close_objects
from mlx_afm.text.response_format import NAMED, ONE, SEVERAL

FORMS = ("json_schema", "json_object", "regex")
ORDER = "x-order"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an answer must be.

    Attributes:
        kind: JSON of a schema, or a text that a pattern matches as a whole.
        text: the schema as JSON, or the pattern.
    """

    kind: Literal["json", "regex"]
    text: str


def parse_wanted(schema: Any) -> Wanted:
    """What an answer must be, from any way of saying it.

    Args:
        schema: a JSON schema; a pydantic model; or a response format, of type `json_schema` (as a message carries
            it), `json_object`, or `regex` with its `pattern`.

    Raises:
        ConfigError: none of these.
    """
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping):
        expected = "a JSON schema, a response format or a pydantic model"
        raise ConfigError(
            "an answer cannot follow this", where="schema", expected=expected, found=type(schema).__name__
        )
    form = schema.get("type")
    if form == "regex":
        pattern = schema.get("pattern")
        if not isinstance(pattern, str):
            facts = {"where": "response_format", "expected": "a text as pattern", "found": type(pattern).__name__}
            raise ConfigError("a regex without pattern", **facts)
        return Wanted(kind="regex", text=pattern)
    if form == "json_object":
        schema = {"type": "object"}
    elif form == "json_schema":
        schema = _inner(schema)
    elif form == "text":
        advice = f"Leave it out, or choose one of {', '.join(FORMS)}."
        raise ConfigError("a response format of type text guides nothing", where="response_format", advice=advice)
    return Wanted(kind="json", text=_json(schema))


def in_order(schema: Any) -> Any:
    """A schema, and those within it, with properties in the order of their `x-order`.

    Properties that `x-order` does not name, as optional ones, keep their places:

        properties a b c, x-order [c, a]      c b a
    """
    if not isinstance(schema, Mapping):
        return schema
    ordered = {key: _within(key, value) for key, value in schema.items()}
    properties, order = ordered.get("properties"), ordered.get(ORDER)
    if isinstance(properties, Mapping) and isinstance(order, (list, tuple)):
        named = [name for name in dict.fromkeys(map(str, order)) if name in properties]
        places = iter(named)
        names = [next(places) if name in named else name for name in properties]
        ordered["properties"] = {name: properties[name] for name in names}
    return ordered


def _within(key: str, value: Any) -> Any:
    if key in ONE:
        return in_order(value)
    if key in SEVERAL and isinstance(value, list):
        return [in_order(item) for item in value]
    if key in NAMED and isinstance(value, Mapping):
        return {name: in_order(item) for name, item in value.items()}
    return value


def _inner(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    outer = response_format.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, Mapping) else None
    if not isinstance(schema, Mapping):
        expected = '{"type": "json_schema", "json_schema": {"name", "description", "schema"}}'
        found = repr(response_format)[:120]
        raise ConfigError("a response format without schema", where="response_format", expected=expected, found=found)
    return schema


def _json(schema: Any) -> str:
    try:
        return json.dumps(close_objects(in_order(schema)), allow_nan=False)
    except RecursionError as error:
        raise ConfigError("the schema is nested too deeply", where="schema") from error
    except (TypeError, ValueError) as error:
        raise ConfigError("the schema is no JSON", where="schema", found=error) from error
