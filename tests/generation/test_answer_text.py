"""Tokens to text: whatever the pieces, the same text, and never a stop text."""

from __future__ import annotations

import random

import pytest

from mlx_afm.generation import AnswerText
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.demo import ASSETS


class Letters:
    """A tokenizer whose token n is the nth of some pieces; id 99 ends an answer."""

    eos_token_ids = frozenset({99})

    def __init__(self, pieces):
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def decode(self, ids):
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", "replace")


def said(pieces, stop=(), end=True):
    """What comes after each piece, and at the end; and whether it stopped."""
    text = AnswerText(Letters([piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]), stop)
    found = [text.add(token) for token in range(len(pieces))]
    return [*found, text.end()] if end else found, text.stopped


def cuts(text, rng):
    places = sorted(rng.sample(range(1, len(text)), rng.randrange(len(text)))) if len(text) > 1 else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def reference(text, stop):
    """Up to where the first stop text to be complete begins."""
    for end in range(len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_random_texts_stops_and_cuts():
    rng = random.Random(0)
    stopped = 0
    for _ in range(4000):
        text = "".join(rng.choices("abé🎉\n", [5, 5, 2, 1, 1], k=rng.randrange(1, 14)))
        stop = ["".join(rng.choices("abé", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        expected, ends = reference(text, stop)
        raw = text.encode()
        found, over = said([bytes(piece) for piece in cuts(raw, rng)], stop)
        assert ("".join(found), over) == (expected, ends)
        stopped += ends
    assert stopped > 500


def test_a_stop_text_over_several_tokens_is_held_back_as_long_as_it_may_come():
    assert said(["one E", "N", "D two"], ["END"]) == (["one ", "", "", ""], True)
    assert said(["one E", "N", "E", "ND"], ["END"]) == (["one ", "", "EN", "", ""], True)
    assert said(["one E", "N"], ["END"]) == (["one ", "", "EN"], False)
    assert said(["a", "b"], ["x"], end=False) == (["a", "b"], False)


def test_half_a_character_waits_for_its_other_half():
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert said(["a", first, second, "b"]) == (["a", "", "é", "b", ""], False)
    assert said(["a", first]) == (["a", "", "\ufffd"], False)


@pytest.mark.parametrize("last", [99, None], ids=["end token", "no end token"])
def test_what_was_held_back_comes_at_the_end(last):
    text = AnswerText(Letters([b"on", b"e E"]), ["END"])
    assert [text.add(0), text.add(1)] == ["on", "e "]
    assert (text.end() if last is None else text.add(last)) == "E"
    assert text.stopped == (last is not None)
    assert text.end() == ""


def test_the_tokenizers_own_text_of_random_tokens():
    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        ids = [token for token in ids if token not in tokenizer.eos_token_ids]
        text = AnswerText(tokenizer)
        assert "".join(map(text.add, ids)) + text.end() == tokenizer.decode(ids)
