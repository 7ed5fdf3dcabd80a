"""A schema to the `response_format` of a message, written the way the model was trained to read it.

    class City(pydantic.BaseModel):
        name: str
        country: str | None = None

    {"role": "user", "content": "Where is Paris?", "response_format": response_format(City)}

The key order within a schema matters: the schema reaches the model as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_afm.errors import ConfigError

# The first keys of every schema, in this order; the others follow as they come.
KEY_ORDER = (
    "type",
    "description",
    "enum",
    "items",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "anyOf",
)
# Keys whose values are schemas; lists of them; and objects of them, by names whose order is the author's.
ONE = ("items", "additionalProperties", "not")
SEVERAL = ("anyOf", "allOf", "oneOf", "prefixItems")
NAMED = ("properties", "$defs")


def response_format(model: Any, *, name: str | None = None, description: str | None = None) -> dict[str, Any]:
    """The `response_format` that asks for JSON of a schema.

    Args:
        model: a pydantic model (anything with a `model_json_schema` method), or a JSON schema.
        name: of the format; `Response` and the schema's title if None.
        description: of the format; the schema's own (a model's docstring) if None.

    Raises:
        ConfigError: no schema of an object, a schema without any name, or one that is no JSON.
    Source: the toolkit's helper (documented behaviour); checked against what pydantic gives.
    """
    schema = model.model_json_schema() if hasattr(model, "model_json_schema") else model
    if not isinstance(schema, Mapping):
        expected = "a pydantic model or a JSON schema"
        raise ConfigError("no response format", expected=expected, found=type(schema).__name__)
    schema = _inlined(schema)
    title = schema.get("title", name)
    if not isinstance(title, str) or not title:
        advice = "Give name=..., or the schema a title."
        raise ConfigError("a response format without a name", where="response_format", advice=advice)
    if schema.get("type") != "object":
        found = repr(schema.get("type"))
        raise ConfigError("the schema is not an object's", where=title, expected="type 'object'", found=found)
    described = description if description is not None else schema.get("description")
    whole = {**schema, "title": title, "$defs": schema.get("$defs", {})}
    json_schema = {
        "name": name if name is not None else f"Response{title}",
        **({} if described is None else {"description": described}),
        "strict": "true",  # the text, as the toolkit writes it
        "schema": _json(whole, title),
    }
    return {"type": "json_schema", "json_schema": json_schema}


def _inlined(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model that contains itself is nothing but a reference; what it names takes its place."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/$defs/"):
        return schema
    named = schema.get("$defs")
    defined = named.get(reference.removeprefix("#/$defs/")) if isinstance(named, Mapping) else None
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return {**defined, **rest} if isinstance(defined, Mapping) else schema


def _ordered(schema: Any) -> Any:
    """A schema, and those within it, in the order of `KEY_ORDER`; objects are closed, with their `x-order`."""
    if not isinstance(schema, Mapping):
        return schema  # `true` and `false` are schemas too
    inner = {key: _within(key, value) for key, value in schema.items()}
    if "properties" in inner:
        inner.setdefault("additionalProperties", False)
        required = inner.get("required")
        inner.setdefault("x-order", list(required) if isinstance(required, (list, tuple)) else [])
    return {key: inner[key] for key in [*(key for key in KEY_ORDER if key in inner), *inner]}


def _within(key: str, value: Any) -> Any:
    if key in ONE:
        return _ordered(value)
    if key in SEVERAL and isinstance(value, list):
        return [_ordered(item) for item in value]
    if key in NAMED and isinstance(value, Mapping):
        return {name: _ordered(item) for name, item in value.items()}
    return value


def _json(schema: Mapping[str, Any], title: str) -> Any:
    """The schema in order, which can be written as JSON."""
    try:
        ordered = _ordered(schema)
        json.dumps(ordered, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError("the schema is no JSON", where=title, found=error) from error
    return ordered
