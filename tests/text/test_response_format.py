"""Schemas to response formats: the toolkit's form, and what the model reads of it."""

import enum
import json
from typing import Literal

import pytest

from mlx_afm import response_format
from mlx_afm.errors import ConfigError
from mlx_afm.text.messages import parse_messages
from mlx_afm.text.template import render

pydantic = pytest.importorskip("pydantic", reason="needs pydantic")


class Kind(enum.Enum):
    CITY = "city"
    TOWN = "town"


class Country(pydantic.BaseModel):
    """Where a place lies."""

    code: str = pydantic.Field(description="two letters", max_length=2)
    name: str | None = None


class Place(pydantic.BaseModel):
    """A place on the map."""

    name: str
    kind: Kind
    lies_in: Country
    rivers: list[str]
    twins: list[Country] = pydantic.Field([])
    size: Literal["s", "l"] = "s"
    heights: dict[str, float]


class Tree(pydantic.BaseModel):
    value: int
    children: list["Tree"] = pydantic.Field([])


class Nothing(pydantic.BaseModel):
    pass


# Written by hand from the rules: the key order is part of it, so it is compared as text.
COUNTRY = {
    "type": "object",
    "description": "Where a place lies.",
    "properties": {
        "code": {"type": "string", "description": "two letters", "maxLength": 2, "title": "Code"},
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Name"},
    },
    "required": ["code"],
    "additionalProperties": False,
    "title": "Country",
    "x-order": ["code"],
}
PLACE = {
    "type": "object",
    "description": "A place on the map.",
    "properties": {
        "name": {"type": "string", "title": "Name"},
        "kind": {"$ref": "#/$defs/Kind"},
        "lies_in": {"$ref": "#/$defs/Country"},
        "rivers": {"type": "array", "items": {"type": "string"}, "title": "Rivers"},
        "twins": {"type": "array", "items": {"$ref": "#/$defs/Country"}, "default": [], "title": "Twins"},
        "size": {"type": "string", "enum": ["s", "l"], "default": "s", "title": "Size"},
        "heights": {"type": "object", "additionalProperties": {"type": "number"}, "title": "Heights"},
    },
    "required": ["name", "kind", "lies_in", "rivers", "heights"],
    "additionalProperties": False,
    "$defs": {"Country": COUNTRY, "Kind": {"type": "string", "enum": ["city", "town"], "title": "Kind"}},
    "title": "Place",
    "x-order": ["name", "kind", "lies_in", "rivers", "heights"],
}


def same_text(value, expected):
    assert json.dumps(value, indent=1) == json.dumps(expected, indent=1)


def test_a_model_literally():
    json_schema = {"name": "ResponsePlace", "description": "A place on the map.", "strict": "true", "schema": PLACE}
    same_text(response_format(Place), {"type": "json_schema", "json_schema": json_schema})


def test_what_is_always_there():
    schema = response_format(Nothing)["json_schema"]["schema"]
    expected = {"type": "object", "properties": {}, "additionalProperties": False, "$defs": {}, "title": "Nothing"}
    same_text(schema, {**expected, "x-order": []})


def test_a_model_that_contains_itself():
    schema = response_format(Tree)["json_schema"]["schema"]
    assert list(schema) == ["type", "properties", "required", "additionalProperties", "$defs", "title", "x-order"]
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    assert inner == schema["$defs"]["Tree"]
    assert schema["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}


def test_a_plain_schema():
    given = {"properties": {"type": {"type": "string"}, "a": {"enum": [2, 1]}}, "required": ["a"], "type": "object"}
    before = json.dumps(given)
    schema = {
        "type": "object",
        "properties": {"type": {"type": "string"}, "a": {"enum": [2, 1]}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {},
        "title": "Answer",
        "x-order": ["a"],
    }
    same_text(
        response_format(given, name="Answer", description="short"),
        {
            "type": "json_schema",
            "json_schema": {"name": "Answer", "description": "short", "strict": "true", "schema": schema},
        },
    )
    assert json.dumps(given) == before
    assert response_format({**given, "title": "Own"})["json_schema"]["name"] == "ResponseOwn"


def test_what_a_schema_says_itself_is_kept():
    given = {"type": "object", "title": "T", "properties": {}, "additionalProperties": True, "x-order": ["b", "a"]}
    schema = response_format(given)["json_schema"]["schema"]
    assert (schema["additionalProperties"], schema["x-order"]) == (True, ["b", "a"])
    assert schema["title"] == "T"


def test_schemas_within_schemas_are_ordered_too():
    inner = {"description": "d", "type": "string"}
    branches = {key: [inner, True] for key in ("anyOf", "oneOf", "allOf", "prefixItems")}
    given = {"title": "T", "properties": {"a": {**branches, "not": inner}}, "type": "object"}
    found = response_format(given)["json_schema"]["schema"]["properties"]["a"]
    ordered = '{"type": "string", "description": "d"}'
    assert json.dumps(found).count(ordered) == 5
    default = {"title": "T", "type": "object", "properties": {"a": {"default": inner, "examples": [inner]}}}
    assert json.dumps(response_format(default)).count('{"description": "d", "type": "string"}') == 2


def test_the_model_reads_it_as_a_message_says_it():
    user = {"role": "user", "content": "where", "response_format": response_format(Nothing)}
    text = render(parse_messages([user], where="x"))[-1].text
    schema = '{"type": "object", "properties": {}, "additionalProperties": false, "$defs": {}, "title": "Nothing"'
    lines = f"name: ResponseNothing\ndescription: None\nschema: {schema}"
    assert text == f'where\n\nresponse format in json.\n{lines}, "x-order": []}}<turn_end>'


@pytest.mark.parametrize(
    ("given", "settings", "fault"),
    [
        (3, {}, "expected a pydantic model or a JSON schema, found int"),
        ({"type": "object"}, {}, "without a name.*Give name="),
        ({"type": "array", "title": "L"}, {}, "L: the schema is not an object's .*found 'array'"),
        ({"type": "object", "default": {1}}, {"name": "N"}, "N: the schema is no JSON"),
        ({"type": "object", "maximum": float("nan")}, {"name": "N"}, "N: the schema is no JSON"),
    ],
)
def test_what_is_no_format(given, settings, fault):
    with pytest.raises(ConfigError, match=fault):
        response_format(given, **settings)
