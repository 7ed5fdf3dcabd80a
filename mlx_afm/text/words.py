"""Texts to ids by words: each word is encoded once and then looked up, which most words of most texts have been.

A word is a text's run of spaces and what follows it up to the next space. That the ids of a text are those of its
words, one after the other, is no matter of course: `words_are_independent` proves it from the model, or says no.

The proof. Nothing is done to a text before it is cut into pieces but that each space becomes the mark U+2581 and one
is put in front: the model has no character map, keeps spaces as they are, and escapes them. No piece has another
character before a mark, so none reaches over the start of a word. BPE joins neighbours into pieces, those with
the best score first, left before right: what is joined within a word never depends on another word. That holds
for symbols cut out beforehand too, since none of them reaches over the start of a word either, and for unknown
characters, which are joined when they are neighbours: a word begins with a mark, and that is known. Not so for models
with unused pieces, which BPE takes apart as it last saw them joined, whichever word that was in.

For a unigram model words have the same best pieces within exact numbers, but SentencePiece adds up scores in single
precision over the whole text, and where two ways are as good (`▁▁▁▁ ▁` and `▁ ▁▁▁▁`) rounding decides, so that the
same word is not always cut alike. There a text is encoded as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import DataError
from mlx_afm.text.sentencepiece_model import SPACE, PieceKind, SentencePieceModel

MAX_WORDS = 1 << 16  # some 15 MB; a table that is full is begun anew
MAX_CHARACTERS = 256  # of a word worth remembering; a text with a longer one is encoded as a whole

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Encode = Callable[[list[str]], list[list[int]]]

_BPE = 2
_INNER = "\x0e"  # a space that does not begin a word, since another stands before it
_START = "\x0f"  # before each text
_CUT = "\x12"  # in place of a mark before which a text may be cut too
SHARED = "\x10"  # what a text may begin with, in place of words that many texts begin with
_MARKS = (_INNER, _START, _CUT, SHARED, SPACE)  # a text with one of these is encoded as a whole


def words_are_independent(model: SentencePieceModel) -> bool:
    """Whether the ids of every text are those of its words, see the module's text."""
    plain = not model.character_map and not model.remove_extra_spaces and model.escape_spaces and model.dummy_prefix
    if model.model_type != _BPE or not plain or model.space_as_suffix:
        return False
    if SPACE not in model.texts(PieceKind.NORMAL, PieceKind.USER_DEFINED) or model.texts(PieceKind.UNUSED):
        return False
    pieces = "\0".join(piece.text for piece in model.pieces)
    return pieces.count("\0") < len(model.pieces) and not re.search(f"[^{SPACE}\0]{SPACE}| ", pieces)


def may_cut_before(mark: str, model: SentencePieceModel) -> bool:
    """Whether, with a model whose words are independent, a text may be cut before a user-defined symbol as well.

    Symbols are found from the left, the longest first, and never joined with what stands beside them. So the mark
    begins a symbol wherever it is spelled, unless one that begins before it reaches into it.
    """
    symbols = model.texts(PieceKind.USER_DEFINED)
    parts = tuple(mark[:end] for end in range(1, len(mark) + 1))
    return mark in symbols and not any(mark in symbol[1:] or symbol[1:].endswith(parts) for symbol in symbols)


class _Numbers(dict[str, int]):
    """Word to its number; a new word gets the next one."""

    def __init__(self) -> None:
        super().__init__({_START: 0})
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        number = self[word] = len(self)
        return number


class WordTable:
    """The words seen so far, and their ids."""

    def __init__(self, encode: Encode, mark: str | None = None) -> None:
        """Takes what encodes a list of texts, with a model whose words are independent.

        Args:
            encode: gives the ids of each text.
            mark: a symbol before which a text may be cut as well.
        """
        self._encode, self._mark = encode, mark
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._shared = ""
        self._ids = np.zeros(0, np.int32)
        self._lengths = np.zeros(1, np.int64)  # of each word, as below
        self._starts = np.zeros(1, np.int64)
        self._long = np.zeros(1, np.bool_)

    def encode(self, texts: Sequence[str], shared: str = "") -> tuple[Ids, Counts]:
        """Ids of all texts, int32 (N,), and how many each has, int64 (texts,).

        Args:
            texts: what to encode; `SHARED` at the beginning of one, before a space, stands for `shared`.
            shared: whole words.

        Raises:
            DataError: a text that is none.
        """
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        joined, whole = _joined(texts, shared, self._mark)
        if len(self._numbers) > MAX_WORDS or shared != self._shared:
            self._forget()
            self._shared = shared
        words = joined.split(" ")
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if self._numbers.new:
            self._learn()
        firsts = np.flatnonzero(numbers == 0)
        lengths = self._lengths[numbers]
        ids, counts = _gathered(self._ids, self._starts[numbers], lengths), np.add.reduceat(lengths, firsts)
        whole |= np.logical_or.reduceat(self._long[numbers], firsts)
        if not whole.any():
            return ids, counts
        rest = [text for text, one in zip(texts, whole) if one]
        return _with(ids, counts, whole, self._encode(in_full(rest, shared)))

    def _learn(self) -> None:
        """Encodes the new words, all of them in one call."""
        new, self._numbers.new = self._numbers.new, []
        sizes = np.fromiter(map(len, new), np.int64, len(new))
        try:
            encoded = self._encode(self._spelled(new, sizes))
        except DataError:
            self._forget()  # rather than words without ids
            raise
        if self._mark is not None:
            for place in [place for place, word in enumerate(new) if word[:1] == _CUT]:
                del encoded[place][:1]  # the lone space that every text begins with
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._long = np.concatenate([self._long, sizes > MAX_CHARACTERS])
        self._ids = np.concatenate([self._ids, flat(encoded)])

    def _spelled(self, words: list[str], sizes: Counts) -> list[str]:
        """The words as they are in a text; those that are too long are empty."""
        if sizes.max() > MAX_CHARACTERS:
            words = [word if len(word) <= MAX_CHARACTERS else "" for word in words]
        spelled = _START.join(words).replace(_INNER, " ").replace(_CUT, self._mark or _CUT)
        return [self._shared if word == SHARED else word for word in spelled.split(_START)]


def in_full(texts: Sequence[str], shared: str) -> list[str]:
    """The same texts without `SHARED`, which stands for `shared` if it is given."""
    return [shared + text[1:] if shared and text[:1] == SHARED else text for text in texts]


def flat(encoded: Sequence[Sequence[int]]) -> Ids:
    """The ids of several texts, one after the other, int32 (N,)."""
    return np.fromiter(chain.from_iterable(encoded), np.int32, sum(map(len, encoded)))


def _joined(texts: Sequence[str], shared: str, mark: str | None) -> tuple[str, npt.NDArray[np.bool_]]:
    """The texts as one, in which one space stands before each word, and which of them must be encoded whole."""
    between = f" {_START} "
    joined = f"{_START} {between.join(texts)}"
    whole = np.zeros(len(texts), np.bool_)
    runs = "  " in joined
    odd = joined.count(_START) > len(texts) or (runs and f" {between}" in joined) or joined.endswith(" ")
    odd = odd or joined.count(SHARED) > (joined.count(f"{_START} {SHARED} ") if shared else 0)
    if odd or _INNER in joined or _CUT in joined or SPACE in joined:
        whole = np.array([_is_unfit(text[1:] if shared and text[:1] == SHARED else text) for text in texts])
        joined = f"{_START} {between.join('.' if one else text for text, one in zip(texts, whole))}"
    if runs:  # of each run of spaces the first remains
        joined = joined.replace("  ", f" {_INNER}").replace(f"{_INNER} ", _INNER * 2)
    if mark is not None:  # after a space it begins a word anyway
        joined = joined.replace(mark, f" {_CUT}").replace(f"  {_CUT}", f" {mark}")
    return joined, whole


def _is_unfit(text: str) -> bool:
    return text[-1:] in ("", " ") or any(mark in text for mark in _MARKS)


def _gathered(ids: Ids, starts: Counts, lengths: Counts) -> Ids:
    """Stretches of ids, one after the other."""
    ends = np.cumsum(lengths)
    stretches: Ids = ids[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])]
    return stretches


def _with(
    ids: Ids, counts: Counts, whole: npt.NDArray[np.bool_], encoded: Sequence[Sequence[int]]
) -> tuple[Ids, Counts]:
    """The same ids with some texts' in place of what was there."""
    starts, lengths = np.cumsum(counts) - counts, counts.copy()
    lengths[whole] = [len(one) for one in encoded]
    starts[whole] = len(ids) + np.cumsum(lengths[whole]) - lengths[whole]
    return _gathered(np.concatenate([ids, flat(encoded)]), starts, lengths), lengths
