"""Encoding by words against SentencePiece itself, and what must hold of a model for the two to agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece_models import model_bytes, toy_pieces

from mlx_afm.errors import DataError
from mlx_afm.text import words as words_module
from mlx_afm.text.sentencepiece_model import Piece, PieceKind, parse_sentencepiece_model
from mlx_afm.text.template import TURN_END
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.words import SHARED, WordTable, may_cut_before, words_are_independent

SETTINGS = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
PARTS = ["<turn_start>", "<turn_end>", "<n>", "<", "n>", " ", "  ", "    ", "\t", "\n", "\r\n", "▁", "▁▁▁▁", "the"]
PARTS += [
    "ﬁ",
    "①",
    "Å",
    "e\u0301",
    "\u00a0",
    "\u3000",
    "\u200b",
    "🦊",
    "👩\u200d👩\u200d👧",
    "東京",
    "----",
    "system",
    "tar",
]
PARTS += ["\x0e", "\x0f", "\x10", "\x12"]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=14)
ODD_TEXTS = ["", " ", "  ", "x ", " x", "a  b", "a \n b", "<turn_end>", " <turn_end>", "a <turn_end>", "a  <turn_end>b"]
ODD_TEXTS += [
    "a<turn_end><turn_end> ",
    "<n><n>",
    SHARED,
    f"{SHARED} a",
    f" {SHARED} ",
    "w" * 300,
    "<turn_end>" + "w" * 300,
]


def parsed(path):
    return parse_sentencepiece_model(path.read_bytes(), where=path)


def assert_same(tokenizer, texts, shared=""):
    ids, counts = tokenizer.encode_flat(texts, shared)
    wanted = [tokenizer.encode(shared + text[1:] if shared and text[:1] == SHARED else text) for text in texts]
    assert ids.dtype == np.int32
    assert counts.tolist() == list(map(len, wanted))
    assert ids.tolist() == [token for one in wanted for token in one]


@given(texts=st.lists(TEXTS.map("".join), max_size=6))
@SETTINGS
def test_the_ids_are_sentencepieces(texts, tokenizer):
    assert_same(tokenizer, texts)
    assert_same(tokenizer, texts)  # now that the words are known


@pytest.mark.parametrize("shared", ["", "<turn_start> system<n>Be kind.  And brief<turn_end><turn_start>"])
def test_odd_texts(tokenizer, shared):
    for text in ODD_TEXTS:
        assert_same(tokenizer, [text], shared)
    assert_same(tokenizer, ODD_TEXTS * 2, shared)
    assert_same(tokenizer, [f"{SHARED} user<n>hi<turn_end>", "other", f"{SHARED} user<n> hi  <turn_end>"], shared)


def test_every_line_of_tldr(model_files, tldr_files):
    for name in ("bpe", "bpe-unk"):
        tokenizer = AFMTokenizer.from_file(model_files[name])
        for path in tldr_files.values():
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:1500]]
            texts = ["".join(f"<turn_start> {m['role']}<n>{m['content']}<turn_end>" for m in line) for line in lines]
            assert_same(tokenizer, texts)


def test_which_models_have_independent_words(model_files):
    found = {name for name, path in model_files.items() if words_are_independent(parsed(path))}
    assert found == {"bpe", "bpe-unk"}


@pytest.mark.parametrize(
    "changes",
    [
        {"character_map": b"x"},
        {"remove_extra_spaces": True},
        {"escape_spaces": False},
        {"dummy_prefix": False},
        {"space_as_suffix": True},
        {"model_type": 1},
    ],
)
def test_settings_that_join_words(model_files, changes):
    model = parsed(model_files["bpe"])
    assert words_are_independent(model)
    assert not words_are_independent(replace(model, **changes))


@pytest.mark.parametrize(
    ("text", "kind", "independent"),
    [
        ("e▁t", PieceKind.NORMAL, False),
        ("e▁t", PieceKind.USER_DEFINED, False),
        ("▁the▁", PieceKind.NORMAL, False),
        ("a b", PieceKind.USER_DEFINED, False),
        ("a\0b", PieceKind.NORMAL, False),
        ("rare", PieceKind.UNUSED, False),
        ("▁▁▁▁▁x", PieceKind.NORMAL, True),
    ],
)
def test_pieces_that_join_words(model_files, text, kind, independent):
    model = parsed(model_files["bpe"])
    assert words_are_independent(replace(model, pieces=(*model.pieces, Piece(text, -1.0, kind)))) == independent


def test_a_model_whose_pieces_reach_over_words_is_encoded_right(tmp_path):
    pieces = [*toy_pieces(), ("o▁", -0.001, 1)]
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(pieces, model_type=2))
    tokenizer = AFMTokenizer.from_file(tmp_path / "tokenizer.model")
    whole = tokenizer.encode("lo w")
    assert tokenizer.convert_tokens_to_ids("o▁") in whole
    assert whole != tokenizer.encode("lo") + tokenizer.encode("w")  # by words it would be another text
    assert_same(tokenizer, ["lo w"])


@pytest.mark.parametrize("symbol", ["x<turn_end>", "x<turn_end>y", "))<", "a<turn_"])
def test_symbols_that_reach_into_a_mark(model_files, symbol):
    model = parsed(model_files["bpe"])
    assert may_cut_before(TURN_END, model)
    assert not may_cut_before(
        TURN_END, replace(model, pieces=(*model.pieces, Piece(symbol, 0, PieceKind.USER_DEFINED)))
    )
    assert not may_cut_before("<missing>", model)


def test_a_full_table_is_begun_anew(model_files, monkeypatch):
    monkeypatch.setattr(words_module, "MAX_WORDS", 3)
    tokenizer = AFMTokenizer.from_file(model_files["bpe"])
    for text in ("one two three four five", "two six", "seven one", "one two three four five"):
        assert_same(tokenizer, [text, "one"])


def test_known_words_are_not_encoded_again(model_files):
    encode, asked = AFMTokenizer.from_file(model_files["bpe"]).encode_many, []

    def counted(texts):
        asked.append(list(texts))
        return encode(texts)

    table = WordTable(counted)
    table.encode(["a cat", "a  dog"])
    table.encode(["a dog", "a cat"])
    assert asked == [["a", "cat", " dog"], ["dog"]]


def test_what_is_no_text_leaves_the_table_whole(model_files):
    tokenizer = AFMTokenizer.from_file(model_files["bpe"])
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode_flat(["good words", "half \ud83d gone"])
    assert_same(tokenizer, ["good words gone"])
