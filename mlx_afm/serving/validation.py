"""What pydantic finds wrong with a body, as one refusal that names every field by its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from mlx_afm.serving.api_error import APIError, invalid_fields, shown
from mlx_afm.spelling import nearest_name

# Where pydantic speaks of Python.
EXPECTED = {
    "dict_type": "expected an object",
    "list_type": "expected an array",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "union_tag_not_found": 'expected an object with a "type"',
    "string_unicode": "expected a text without lone surrogates",
}
JSON_WORDS = {"'": '"', "True": "true", "False": "false", " or None": "", "None": "null"}


def field_errors(errors: Sequence[Mapping[str, Any]], body: Any, model: type[BaseModel] | None) -> APIError:
    """The refusal.

    Args:
        errors: of pydantic.
        body: the value that was validated.
        model: what it should have been, whose fields a misspelled one may mean.
    """
    faults: dict[str, str] = {}
    for error in errors:
        path = _path(error["loc"], body, ends=error["type"] == "missing")
        what = _what(error, model)
        faults[path] = f"{faults[path]}; or {what}" if path in faults else what
    return invalid_fields(list(faults.items()))


def _what(error: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    if error["type"] == "missing":
        return "this field is required"
    if error["type"] == "extra_forbidden":
        near = nearest_name(str(error["loc"][-1]), _names_beside(error["loc"], model))
        return f"not a field of this request{f'; did you mean {near}?' if near else ''}"
    expected = EXPECTED.get(error["type"]) or str(error["msg"]).replace("Input should be", "expected")
    if error["type"] == "union_tag_invalid":
        expected = f"expected type {error['ctx']['expected_tags']}"
    for python, json in JSON_WORDS.items():
        expected = expected.replace(python, json)
    return f"{expected[:1].lower()}{expected[1:]}, found {shown(error['input'])}"


def _path(location: Sequence[str | int], value: Any, *, ends: bool) -> str:
    """`messages[0].content` for a place in a body, without pydantic's names for the members of unions."""
    path = ""
    for number, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            path, value = f"{path}.{part}", value[part]
        elif ends and number == len(location) - 1:
            path = f"{path}.{part}"
    return path.removeprefix(".")[:200]


def _names_beside(location: Sequence[str | int], model: type[BaseModel] | None) -> list[str]:
    """The fields of the object that a place is in; of a member of a union too."""
    types: list[Any] = [model]
    for part in location[:-1]:
        models = [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]
        fields = [each.model_fields[str(part)].annotation for each in models if str(part) in each.model_fields]
        types = [inner for field in fields for inner in _members(field)] or types
    models = [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]
    return [field.alias or name for each in models for name, field in each.model_fields.items()]


def _members(annotation: Any) -> list[Any]:
    """The types within a union, a list, or an annotated type."""
    if get_origin(annotation) in (Union, UnionType, list, Annotated):
        return [member for inner in get_args(annotation) for member in _members(inner)]
    return [annotation]
