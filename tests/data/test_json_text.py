"""JSON of one line: how deep it may be nested, and which brackets count."""

import json

import pytest

from mlx_afm.data.json_text import parse_json
from mlx_afm.errors import DataError


def nested(levels):
    return '{"a": [' * (levels // 2) + ("{}" if levels % 2 else "1") + "]}" * (levels // 2)


@pytest.mark.parametrize("levels", [63, 64])
def test_64_levels_are_allowed(levels):
    text = nested(levels)
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("levels", [65, 66, 2000])
def test_more_levels_are_refused(levels):
    with pytest.raises(DataError, match=r"nested too deeply .expected at most 64 levels") as error:
        parse_json(nested(levels))
    assert error.value.kind == "nested-too-deeply"


@pytest.mark.parametrize("item", ["[]", "{}", '{"a": ["x", {"b": []}]}', '"[[[{{{"', r'"\"[{\\"', r'["\\", "[\""]'])
def test_brackets_side_by_side_and_in_texts_are_not_levels(item):
    text = f"[{', '.join([item] * 100)}]"
    assert parse_json(text) == json.loads(text)
