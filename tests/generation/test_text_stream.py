"""Tokens to text: whatever the pieces are, the same text, and never a stop string."""

from __future__ import annotations

import random

import pytest

from mlx_afm.generation import TextStream, TokenLogprob
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
    text = TextStream(Letters([piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]), stop)
    found = [text.add(token).text for token in range(len(pieces))]
    return [*found, text.finish().text] if end else found, text.stopped


def cuts(text, rng):
    places = sorted(rng.sample(range(1, len(text)), rng.randrange(len(text)))) if len(text) > 1 else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def reference(text, stop):
    """Up to where the first stop text to be complete begins; of several complete at once the longest counts."""
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
    text = TextStream(Letters([b"on", b"e E"]), ["END"])
    assert [text.add(0).text, text.add(1).text] == ["on", "e "]
    assert (text.finish() if last is None else text.add(last)).text == "E"
    assert text.stopped == (last is not None)
    assert text.finish().text == ""


def test_the_tokenizers_own_text_of_random_tokens():
    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        ids = [token for token in ids if token not in tokenizer.eos_token_ids]
        text = TextStream(tokenizer)
        pieces = [text.add(token).text for token in ids]
        assert "".join(pieces) + text.finish().text == tokenizer.decode(ids)


def test_the_first_stop_string_to_be_complete_ends_the_answer():
    """Both cases of which two engines gave two answers; however the text is cut."""
    for pieces in (["x", "ab", "cd"], ["x", "a", "b", "c", "d"], ["xabcd"], ["xab", "cd"]):
        found, stopped = said(pieces, ["abcd", "bc"])
        assert ("".join(found), stopped) == ("xa", True)
        found, stopped = said(pieces, ["abc", "b"])
        assert ("".join(found), stopped) == ("xa", True)


def test_of_stop_strings_that_are_complete_at_once_the_longest_counts():
    for pieces in (["xabc"], ["xa", "bc"], ["xab", "c"]):
        assert "".join(said(pieces, ["bc", "abc", "c"])[0]) == "x"


def test_nothing_is_added_behind_the_end():
    text = TextStream(Letters([b"abXcd"]), ["X"], keeps_tokens=True)
    assert text.add(0).text == "ab"
    assert text.stopped
    assert (text.add(0).text, text.finish().text) == ("", "")


def test_tokens_come_with_the_text_that_they_begin_in():
    """A token is given out with its first character; one that begins in a stop string never is."""
    rng = random.Random(2)
    for _ in range(1500):
        text = "".join(rng.choices("abé🎉", [5, 5, 2, 1], k=rng.randrange(1, 14)))
        stop = ["".join(rng.choices("abé", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        pieces = [piece.encode() for piece in cuts(text, rng)]
        stream = TextStream(Letters(pieces), stop, keeps_tokens=True)
        given, said_so_far = [], ""
        for token in range(len(pieces)):
            piece = stream.add(TokenLogprob(token, -float(token)))
            given += piece.tokens
            said_so_far += piece.text
        last = stream.finish()
        given, said_so_far = given + list(last.tokens), said_so_far + last.text
        expected, stopped = reference(text, stop)
        assert said_so_far == expected
        assert [token.token for token in given] == list(range(len(given)))
        assert all(token.logprob == -token.token for token in given)
        if not stopped:
            assert len(given) == len(pieces)
        else:  # every token whose first character is in the answer
            starts = [len(b"".join(pieces[:number]).decode()) for number in range(len(pieces))]
            assert len(given) == sum(start < len(expected) for start in starts)
