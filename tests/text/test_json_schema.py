"""Objects of a schema keep to the properties that it names."""

import copy

import pytest

from mlx_afm.text.json_schema import close_objects

A, B = {"properties": {"a": {}}}, {"properties": {"b": {}}}
CLOSED = {**A, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (A, CLOSED),
        ({"type": "object"}, {"type": "object"}),
        ({**A, "additionalProperties": True}, {**A, "additionalProperties": True}),
        ({**A, "patternProperties": {"x": {}}}, {**A, "patternProperties": {"x": {}}}),
        ({"items": A}, {"items": CLOSED}),
        ({"properties": {"x": A}}, {"properties": {"x": CLOSED}, "additionalProperties": False}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"allOf": [A]}, {"allOf": [CLOSED]}),
        ({"allOf": [A, B]}, {"allOf": [A, B]}),
        ({**A, "anyOf": [B]}, {**A, "anyOf": [B]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
        ({**B, "$ref": "#/$defs/x", "$defs": {"x": A}}, {**B, "$ref": "#/$defs/x", "$defs": {"x": A}}),
        (
            {"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": A, "y": A}},
            {"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": A, "y": CLOSED}},
        ),
        ({"properties": {"properties": {"type": "object"}}}, None),
        (True, True),
    ],
)
def test_what_is_closed(schema, closed):
    if closed is None:
        closed = {**schema, "additionalProperties": False}
    before = copy.deepcopy(schema)
    assert close_objects(schema) == closed
    assert schema == before
