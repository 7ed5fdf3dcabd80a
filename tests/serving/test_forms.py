"""Forms that clients ask for, however odd: an answer can be held to them, or they are refused."""

import copy
import json
import random

import pytest
from pydantic import ValidationError

from mlx_afm.serving.api_error import APIError, parse_json
from mlx_afm.serving.bodies import ChatBody
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.plan import constraint_of
from mlx_afm.serving.requests import Reader
from mlx_afm.serving.validation import field_errors
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.demo import ASSETS

pytest.importorskip("llguidance", reason="needs the guided extra")
SCHEMA = {
    "type": "object",
    "title": "Person",
    "description": "Who it is.",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 1, "maxItems": 2},
        "friend": {"anyOf": [{"$ref": "#/$defs/Friend"}, {"type": "null"}]},
    },
    "required": ["name", "age"],
    "x-order": ["age", "name"],
    "additionalProperties": False,
    "$defs": {"Friend": {"type": "object", "properties": {"since": {"type": "string", "format": "date"}}}},
}
ODD = [None, True, 3, -1, 0.5, 1e300, "", "x", "#/$defs/Nobody", "(", [], [[]], {}, {"a": {}}, [None], "\ud800", "\0"]
ODD += [2**70]


def body(schema, form):
    asked = {"model": "base", "messages": [{"role": "user", "content": "who is it"}]}
    if form == "response_format":
        return asked | {form: {"type": "json_schema", "json_schema": {"name": "Person", "schema": schema}}}
    tool = {"type": "function", "function": {"name": "person", "parameters": schema}}
    return asked | {"tools": [tool], "tool_choice": "required"}


def places(value, path=()):
    """Every place within a value, by its keys."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def mutated(rng):
    schema = copy.deepcopy(SCHEMA)
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice([place for place in places(schema) if place])
        holder = schema
        for key in path:
            holder = holder[key]
        if rng.random() < 0.2 and isinstance(holder, dict):
            holder[rng.choice(["$ref", "items", "not", "oneOf", "const", "$defs", "x-order"])] = rng.choice(ODD)
        elif rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = rng.choice(ODD)
    return schema


@pytest.fixture(scope="module")
def hold():
    """Goes the way of a request: whether an answer can be held to its form."""
    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    reader = Reader(tokenizer, ServeConfig(port=0), tokenizer.vocab_size)

    statuses = set()

    def go(asked):
        value = parse_json(json.dumps(asked).encode())
        try:
            return constraint_of(reader.chat(ChatBody.model_validate(value)), tokenizer) is not None
        except ValidationError as error:
            statuses.add(field_errors(error.errors(), value, ChatBody).status)
            return False
        except APIError as refusal:
            statuses.add(refusal.status)
            return False

    yield go
    assert statuses == {400}


@pytest.mark.parametrize("form", ["response_format", "tools"])
def test_a_schema_is_kept_or_refused(form, hold):
    assert hold(body(SCHEMA, form))
    rng = random.Random(form)
    held = [hold(body(mutated(rng), form)) for _ in range(300)]
    assert 30 < sum(held) < 270


@pytest.mark.parametrize("form", ["response_format", "tools"])
@pytest.mark.parametrize("depth", [100, 200, 300, 400])
def test_a_schema_that_is_deep(depth, form, hold):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    try:
        json.dumps(body(schema, form))
    except RecursionError:
        pytest.skip("too deep for the client")
    assert not hold(body(schema, form))
