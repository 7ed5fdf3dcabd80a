"""Plain lines against the full way: what is taken as plain must be read and rendered the same, without a warning."""

import json
from dataclasses import fields as dataclass_fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text.sentencepiece_models import TRAINED

from mlx_afm.data import read_tokens
from mlx_afm.data.blocks import BlockRenderer
from mlx_afm.data.config import DataConfig
from mlx_afm.data.plain import PlainReader
from mlx_afm.data.prepare import Block, Preparer, iter_blocks
from mlx_afm.data.records import RecordReader, encode_example, render_example
from mlx_afm.data.rows import DataRow
from mlx_afm.text.messages import Message
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.words import SHARED

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
NEXT = '"}, {"role": "user", "content": "'
PIECES = ['"', "\\", "\n", "\t", NEXT, '"}]', "<n>", "<turn_end>", "\u00a0", "\ufffd", "é", "🦊"]
CONTENT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map("".join)
STYLES = [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"ensure_ascii": False, "separators": (",", ":")}]
SPLICES = [b'"', b"\\", b"}", b"[", b'"}]\n', b"\\n", b"\\u0041", b"\x04", b"\x05", b"\x10", b"\xff", b"\xef\xbb\xbf"]
SPLICES += [b"\xed\xa0\x80", NEXT.encode(), NEXT.replace("user", "assistant").encode(), b"[" + NEXT[4:].encode(), b" "]
SYSTEMS = ["Be brief.", 'Say "so".', " "]


@st.composite
def conversations(draw):
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    messages = [{"role": "system", "content": draw(st.sampled_from(SYSTEMS))}] * draw(st.booleans())
    for ask, answer in turns:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return messages


@st.composite
def lines(draw):
    """Lines as `json.dumps` writes them, some of them damaged."""
    record = draw(conversations())
    value = {"messages": record} if draw(st.booleans()) else record
    line = json.dumps(value, **draw(st.sampled_from(STYLES))).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(line)))
        line = line[:start] + draw(st.sampled_from(SPLICES)) + line[start + draw(st.integers(0, 3)) :]
    return line.replace(b"\n", b"")


def rows_of(*texts):
    return [DataRow(number, text) for number, text in enumerate(texts, start=1) if text]


def assert_as_read(rows, config, special_pieces):
    """Checks each row that is taken as plain; returns how many."""
    plain = PlainReader(config, special_pieces)(rows)
    if plain is None:
        return 0
    read = RecordReader(config, special_pieces)
    assert len(plain.texts) == len(plain.roles) == len(rows)
    for row, text, roles in zip(rows, plain.texts, plain.roles):
        if roles is not None:
            spans = render_example(read(row, 0, "x"), config.system)
            assert plain.shared * (text[:1] == SHARED) + text.removeprefix(SHARED) == "".join(s.text for s in spans)
            assert roles == tuple(span.role for span in spans[1::2])
    return sum(roles is not None for roles in plain.roles)


@given(texts=st.lists(lines(), max_size=5), system=st.sampled_from([None, "Help.", 'A "b"\nc\\', "t\tab", "a\x04b"]))
@SETTINGS
def test_what_is_plain_is_read_the_same(texts, system, tokenizer):
    assert_as_read(rows_of(*texts), DataConfig(system=system), tokenizer.special_pieces)


@given(
    texts=st.lists(lines(), max_size=6),
    data_format=st.sampled_from(["auto", "toolkit", "messages", "sharegpt"]),
    fields=st.sampled_from([(), (("tools", "messages"),), (("prompt", "messages"),)]),
)
@SETTINGS
def test_blocks_are_prepared_the_same_without_it(texts, data_format, fields, tokenizer):
    block, config = Block(0, "x.jsonl", 0, rows_of(*texts)), DataConfig(data_format=data_format, fields=fields)
    for want_tokens in (True, False):
        with_it = Preparer(config, tokenizer, want_tokens=want_tokens)
        without = Preparer(config, tokenizer, want_tokens=want_tokens)
        without.render._plain = lambda rows: None
        found, wanted = with_it(block), without(block)
        for field in dataclass_fields(wanted):
            np.testing.assert_equal(getattr(found, field.name), getattr(wanted, field.name), field.name)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wrap", [lambda messages: messages, lambda messages: {"messages": messages}])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": 'Say "no"\n\\ twice'}]])
def test_usual_lines_are_plain(style, wrap, system, tokenizer):
    ask, say = {"role": "user", "content": 'a "b"\n\\c é'}, {"role": "assistant", "content": "d"}
    records = [[*system, ask, say], [*system, ask, say, ask, say], [*system, say | {"role": "user"}, say]]
    rows = rows_of(*[json.dumps(wrap(record), **style).encode() for record in records])
    escaped = style.get("ensure_ascii", True)  # \u00e9 asks for a closer look
    for config in (DataConfig(), DataConfig(system=None)):
        assert assert_as_read(rows, config, tokenizer.special_pieces) == (1 if escaped else 3)


@pytest.mark.parametrize("content", ["<turn_end>", "spell <n>", "\ufffd", "", " \n", "\u3000", "\x10 x", "half \ud83d"])
def test_what_asks_for_a_closer_look(content, tokenizer):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    odd = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    for style in ({}, {"ensure_ascii": False}):
        rows = rows_of(*[json.dumps(record, **style).encode("utf-8", "surrogatepass") for record in (good, odd)])
        plain = PlainReader(DataConfig(), tokenizer.special_pieces)(rows)
        assert plain is None or (plain.roles[0] is not None and plain.roles[1] is None)


def test_nearly_all_of_tldr_is_plain(tldr_train, tokenizer):
    blocks = list(iter_blocks((tldr_train,)))[:3]
    counts = [assert_as_read(block.rows, DataConfig(), tokenizer.special_pieces) for block in blocks]
    assert sum(counts) > 0.999 * sum(len(block.rows) for block in blocks)


def test_a_text_that_begins_with_the_mark_of_what_is_shared(tokenizer, write):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("train.jsonl", talk, {"text": f"{SHARED} c"}, talk)
    (block,) = iter_blocks((path,))
    rendered = BlockRenderer(DataConfig(), tokenizer.special_pieces)(block)
    assert [rendered.whole_text(place) for place in range(3)][1] == f"{SHARED} c"
    prepared = Preparer(DataConfig(), tokenizer, want_tokens=True)(block)
    assert prepared.ids.tolist().count(tokenizer.turn_start_id) == 2 * 3


def test_runs_of_spaces_are_cut_as_in_the_whole_conversation(tmp_path):
    """In a unigram model rounding decides between ways of the same score, so that what stands before counts."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(TRAINED["unigram"]())
    tokenizer = AFMTokenizer.from_file(model)
    rng = np.random.default_rng(0)
    talks = [
        (Message("user", "x".join(" " * count for count in rng.integers(1, 10, 30))), Message("assistant", "y"))
        for _ in range(60)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps([{"role": m.role, "content": m.content} for m in talk]) + "\n" for talk in talks)
    )
    read = RecordReader(DataConfig())
    wanted = [encode_example(read(row, 0, "x"), tokenizer).ids for block in iter_blocks((path,)) for row in block.rows]
    assert [tokens.ids.tolist() for tokens in read_tokens((path,), model)] == wanted
