"""`metadata.json`: canonical text, names that devices take, and what reading refuses."""

import json

import pytest

from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.fmadapter_metadata import (
    MAX_METADATA_BYTES,
    Metadata,
    parse_metadata,
    read_metadata,
    require_adapter_name,
)
from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)
CANONICAL = """{
    "adapterIdentifier": "fmadapter-colours_2-9799725",
    "author": "3P developer",
    "baseModelSignature": "9799725ff8e851184037110b422d891ad3b92ec1",
    "creatorDefined": {
        "a": 1,
        "ä": [
            true
        ]
    },
    "description": "größer",
    "license": "",
    "loraRank": 32,
    "speculativeDecodingDraftTokenCount": 5
}"""


def colours(**changes):
    return Metadata(
        **{"name": "colours_2", "description": "größer", "creator_defined": {"ä": [True], "a": 1}, **changes}
    )


def test_text_is_canonical():
    assert colours().text() == CANONICAL
    assert colours().identifier == "fmadapter-colours_2-9799725"
    assert colours().folder_name == "colours_2.fmadapter"


@pytest.mark.parametrize(
    ("metadata", "geometry"),
    [
        (colours(), APPLE_GEOMETRY),
        (colours(rank=2, signature="ab" * 20, license="MIT", draft_token_count=3), TINY),
        (colours(rank=2, creator_defined={"mlx_afm": {"scale": 0.5}}), TINY),
    ],
)
def test_what_was_written_is_read(tmp_path, metadata, geometry):
    (tmp_path / "metadata.json").write_bytes(metadata.text(geometry).encode())
    assert read_metadata(tmp_path / "metadata.json") == (metadata, geometry)


def test_other_sizes_are_stated_and_apples_are_not():
    stated = json.loads(colours(rank=2).text(TINY))["creatorDefined"]
    assert stated["mlx_afm"] == {"geometry": {**TINY.__dict__}}
    assert "mlx_afm" not in json.loads(colours().text())["creatorDefined"]


@pytest.mark.parametrize("name", ["a", "A_9", "x" * 200])
def test_good_names_pass(name):
    assert require_adapter_name(name) == name


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("my-adapter", "my_adapter"),
        ("a b.c", "a_b_c"),
        ("über", "ber"),
        ("", "my_adapter"),
        ("a\n", "a"),
        ("-", "my_adapter"),
        ("x" * 201, "x" * 200),
        ("../up", "up"),
        (None, "None"),
    ],
)
def test_names_that_fail_on_a_device_are_refused_with_advice(name, advice):
    with pytest.raises(ConfigError, match=f"Hyphens, spaces and dots fail on the device; use e.g. {advice}$"):
        require_adapter_name(name)


def test_all_unusable_values_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Metadata(name="x", signature="AB" * 20, rank=0, author=None, draft_token_count=True, creator_defined=[])
    assert len(caught.value.details) == 5


@pytest.mark.parametrize(
    ("creator", "words"),
    [
        ({"a": (1, 2)}, "what JSON would change"),
        ({1: "a"}, "what JSON would change"),
        ({"a": float("nan")}, "cannot be written as JSON"),
        ({"a": object()}, "cannot be written as JSON"),
        ({"mlx_afm": {"geometry": {}}}, "filled in on writing"),
        ({"mlx_afm": 3}, "for this library"),
        ({"a": "\ud800"}, "not Unicode"),
        ({"a": "x" * MAX_METADATA_BYTES}, "bytes too long"),
    ],
)
def test_creator_data_that_json_cannot_hold_is_refused(creator, words):
    with pytest.raises(ConfigError, match=words):
        Metadata(name="x", creator_defined=creator)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def test_deep_creator_data_is_refused():
    with pytest.raises(ConfigError, match="nested too deeply"):
        Metadata(name="x", creator_defined={"a": nested(200)})


HOSTILE = {
    "an array": b"[]",
    "no JSON": b"{",
    "nothing": b"",
    "byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"a": "\xff"}',
    "repeated key": b'{"a": 1, "a": 2}',
    "repeated inner key": b'{"a": {"b": 1, "b": 2}}',
    "NaN": b'{"a": NaN}',
    "overflowing number": b'{"a": 1e999}',
    "endless integer": b'{"a": ' + 9999 * b"1" + b"}",
    "lone surrogate": rb'{"a": "\ud800"}',
    "deep": b'{"a": ' + 200 * b"[" + 200 * b"]" + b"}",
    "very deep": b'{"a": ' + 200_000 * b"[" + 200_000 * b"]" + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused(name):
    with pytest.raises(FormatError, match="not a UTF-8 JSON object"):
        parse_metadata(HOSTILE[name])


def written(tmp_path, **changes):
    content = {**json.loads(CANONICAL), **changes}
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_optional_and_unknown_keys_do_not_matter(tmp_path):
    path = written(tmp_path, license=None, speculativeDecodingDraftTokenCount=None, creatorDefined=None, extra=1)
    metadata, _ = read_metadata(path)
    assert metadata == Metadata(name="colours_2", description="größer")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapterIdentifier": None}, "key 'adapterIdentifier' is missing"),
        ({"loraRank": None}, "key 'loraRank' is missing"),
        ({"adapterIdentifier": "fmadapter-a-b-9799725"}, "not a name that devices accept"),
        ({"adapterIdentifier": "fmadapter-a-1234567"}, "expected fmadapter-a-9799725, found 'fmadapter-a-1234567'"),
        ({"adapterIdentifier": 5}, "wrong adapterIdentifier"),
        ({"baseModelSignature": 5}, "signature must be 40"),
        ({"loraRank": 16}, "expected 32, found 16"),
        ({"loraRank": "32"}, "rank must be a whole number"),
        ({"creatorDefined": 5}, "creator_defined must be a mapping"),
        ({"creatorDefined": {"mlx_afm": 5}}, "for this library"),
        ({"creatorDefined": {"mlx_afm": {"geometry": {"hidden": 1}}}}, "not a geometry"),
        ({"description": ["x"]}, "description must be text"),
    ],
)
def test_unusable_content_is_refused_with_the_reason(tmp_path, changes, words):
    with pytest.raises(FormatError, match=words):
        read_metadata(written(tmp_path, **changes))


def test_large_and_absent_files_are_refused(tmp_path):
    path = tmp_path / "metadata.json"
    with pytest.raises(FormatError, match="no such file"):
        read_metadata(path)
    path.write_bytes(b" " * MAX_METADATA_BYTES + b"{}")
    with pytest.raises(FormatError, match="more than 1000000 bytes"):
        read_metadata(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_metadata(path)
