"""JSON schemas as constraints of an answer: an object keeps to the properties that its schema names.

JSON Schema lets an object have any other property too, unless `additionalProperties` is false; what pydantic,
LangChain and most people write leaves it out and means the named properties. A model that is held to such a schema
invents properties, so the library closes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_afm.text.response_format import NAMED, ONE, SEVERAL

# Keys beside `properties` that say what other properties there may be.
SAYS = ("additionalProperties", "unevaluatedProperties", "patternProperties")
# Keys whose schemas apply to the same object, so that one of them alone does not name all of its properties.
JOINT = ("allOf", "anyOf", "oneOf", "$ref", "not", "if", "then", "else", "dependentSchemas")


def close_objects(schema: Any) -> Any:
    """A schema, and those within it, whose objects have no properties but those that are named.

        {"properties": {"a": {}}}                                  gets "additionalProperties": false
        {"properties": {"a": {}}, "additionalProperties": true}    stays
        {"type": "object"}                                         stays: any object
        {"allOf": [X, Y]}                                          X and Y stay open: both name properties

    Args:
        schema: of JSON; it is left as it is.
    """
    joint = set(_joint_references(schema, schema))
    return _closed(schema, "#", joint)


def _closed(schema: Any, path: str, joint: set[str], *, stays_open: bool = False) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    shared = _is_joint(schema)
    inner = {key: _within(key, value, f"{path}/{key}", joint, shared) for key, value in schema.items()}
    says = any(key in schema for key in (*SAYS, *JOINT))
    if isinstance(schema.get("properties"), Mapping) and not says and not stays_open and path not in joint:
        inner["additionalProperties"] = False
    return inner


def _within(key: str, value: Any, path: str, joint: set[str], shared: bool) -> Any:
    open_too = shared and key in JOINT
    if key in (*ONE, "if", "then", "else"):
        return _closed(value, path, joint, stays_open=open_too)
    if key in SEVERAL and isinstance(value, list):
        return [_closed(item, f"{path}/{place}", joint, stays_open=open_too) for place, item in enumerate(value)]
    if key in (*NAMED, "definitions", "dependentSchemas") and isinstance(value, Mapping):
        return {name: _closed(item, f"{path}/{name}", joint, stays_open=open_too) for name, item in value.items()}
    return value


def _is_joint(schema: Mapping[str, Any]) -> bool:
    """Whether several schemas together say which properties one object has."""
    several = schema.get("allOf")
    parts = sum(key in schema for key in (*JOINT, "properties"))
    return parts > 1 or (isinstance(several, list) and len(several) > 1) or "not" in schema or "if" in schema


def _joint_references(schema: Any, root: Any) -> Iterator[str]:
    """Places of the definitions that are referred to from where several schemas apply to one object."""
    level = [(schema, False)]
    while level:
        item, shared = level.pop()
        if isinstance(item, Mapping):
            if (shared or _is_joint(item)) and isinstance(reference := item.get("$ref"), str):
                yield reference
            here = _is_joint(item)
            level += [(value, here and key in JOINT) for key, value in item.items()]
        elif isinstance(item, list):
            level += [(value, shared) for value in item]
