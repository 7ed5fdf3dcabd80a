"""Random damage to good lines: a reader raises DataError or gives an example, and check agrees with training."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import FAULTS, encoded, good_line

from mlx_afm.data import DataConfig, read_tokens
from mlx_afm.data.check import check_data
from mlx_afm.data.fix import fix_data
from mlx_afm.data.prepare import Block, Preparer
from mlx_afm.data.records import Example, RecordReader
from mlx_afm.data.rows import DataRow
from mlx_afm.errors import DataError

LINES = [encoded(good_line("train", number)) for number in range(16)]
LINES += [encoded(line) for _, line in FAULTS if len(encoded(line)) < 10_000]
PIECES = [b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\\u0000", b"\\ud83d", b"\0", b"\xff", b"\xc3", b"null",
          b"NaN", b"1e999", b"9" * 5000, b'"role"', b'"content"', b'"tool_calls"', b'"tools"', b"<turn_end>", b"<n>",
          b"[" * 70, b'{"a":' * 1100, b"\xef\xbb\xbf", b"\xf0\x9f\x98\x80", b"\r", b" ", b'\\"']  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "<turn_end>", "\0", "\ud800", "[{", '[{"role": 1}]', "[" * 99 + "]" * 99]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = ["role", "content", "messages", "tools", "tool_calls", "response_format", "function", "name", "arguments",
        "from", "value", "system", "history", "prompt", "text", "input", "extra"]  # fmt: skip
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged_bytes(draw):
    """A line with some pieces taken out and others put in."""
    line = draw(st.sampled_from(LINES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(line)))
        stop = draw(st.integers(start, min(len(line), start + 12)))
        line = line[:start] + draw(st.just(b"") | st.sampled_from(PIECES) | st.binary(max_size=4)) + line[stop:]
    return line.replace(b"\n", b" ")


@st.composite
def damaged_values(draw):
    """A line with other values at some places of its structure."""
    value = json.loads(draw(st.sampled_from(LINES[:16])))
    for _ in range(draw(st.integers(1, 3))):
        value = _damage(draw, value)
    return json.dumps(value).encode()


def _damage(draw, value):
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _damage(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, dict) and draw(st.booleans()):
        key = draw(st.sampled_from([*value, *KEYS]))
        return {**value, key: _damage(draw, value.get(key))}
    return draw(VALUES)


@pytest.mark.parametrize("data_format", ["auto", "messages", "toolkit", "sharegpt", "instruction"])
@given(line=damaged_bytes() | damaged_values())
@SETTINGS
def test_a_line_is_an_example_or_a_data_error(line, data_format, tokenizer):
    config = DataConfig(data_format=data_format)
    with suppress(DataError):
        assert isinstance(RecordReader(config)(DataRow(1, line), 0, "x"), Example)
    prepared = Preparer(config, tokenizer, want_tokens=True)(Block(0, "x", 0, [DataRow(1, line)]))
    assert len(prepared.examples) + any(problem.is_error for problem in prepared.problems) == 1
    assert "wrong-record" not in {problem.kind for problem in prepared.problems}
    json.dumps([problem.to_dict() for problem in prepared.problems], ensure_ascii=False).encode()


@given(lines=st.lists(damaged_bytes() | damaged_values() | st.sampled_from(LINES[:16]), min_size=1, max_size=5))
@SETTINGS
def test_check_and_training_agree_and_a_fixed_copy_is_right(lines, tokenizer_file, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("fuzz")
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = check_data({"train": (path,)}, None, tokenizer_file)
    try:
        table = read_tokens((path,), tokenizer_file)
    except DataError:
        table = None
    assert report.ok == (table is not None)
    if table is not None:
        assert len(table) == report.files[0].examples
    try:
        fixed = fix_data({"train": (path,)}, folder / "fixed", None, tokenizer_file)
    except DataError:
        assert report.files[0].examples == 0
        return
    again = check_data({"train": fixed.files}, None, tokenizer_file)
    assert again.ok
    assert "duplicate" not in again.counts
    assert set(fixed.files[0].read_bytes().splitlines()) <= set(path.read_bytes().splitlines())
