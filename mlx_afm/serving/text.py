"""Tokens to text as they come, cut at stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlx_afm.serving.jobs import Said
from mlx_afm.text.sentencepiece_model import SPACE
from mlx_afm.text.tokenizer import AFMTokenizer

UNFINISHED = "\ufffd"  # what bytes of a character decode to before its last one is there
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """What a token is called and which bytes it stands for, as log probabilities tell it."""

    def __init__(self, tokenizer: AFMTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _pieces(self) -> list[str]:
        return self._tokenizer.convert_ids_to_tokens(range(self._tokenizer.vocab_size))

    def describe(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes of a token; a lone byte is called `bytes:\\xe4`."""
        if token == self._tokenizer.newline_id:
            return "\n", [10]
        if not 0 <= token < len(self._pieces):  # a row of the embedding without a piece
            return f"<{token}>", list(f"<{token}>".encode())
        piece = self._pieces[token]
        if match := BYTE.fullmatch(piece):
            return f"bytes:\\x{match[1].lower()}", [int(match[1], 16)]
        text = piece.replace(SPACE, " ")
        return text, list(text.encode())


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that begin in it."""

    text: str
    said: tuple[Said, ...] = ()


@dataclass
class TextStream:
    """Text of an answer, held back where it could be the beginning of a stop string.

        push "Hel", "lo", " E"   with stop " END"    gives "Hel", "lo", "" and after push "ND" it has stopped

    Attributes:
        tokenizer: the model's.
        stops: strings that end the answer and are not part of it.
        keeps_tokens: tell tokens with their text.
    """

    tokenizer: AFMTokenizer
    stops: Sequence[str] = ()
    keeps_tokens: bool = False
    stopped: bool = False
    _line: list[int] = field(default_factory=list)
    _taken: int = 0  # characters of the line that were passed on
    _held: str = ""
    _released: int = 0
    _tokens: list[tuple[int, Said]] = field(default_factory=list)  # each with the place where its text begins

    def push(self, said: Said) -> Piece:
        """Takes a token; gives the text that is now certain."""
        if self.keeps_tokens:
            self._tokens.append((self._released + len(self._held), said))
        if said.token == self.tokenizer.newline_id:
            self._held += self._rest_of_line() + "\n"
        elif said.token < self.tokenizer.vocab_size:
            self._line.append(said.token)
            text = self.tokenizer.decode(self._line).rstrip(UNFINISHED)
            self._held += text[self._taken :]
            self._taken = max(self._taken, len(text))
        return self._release(len(self._held) - self._open_stop())

    def finish(self) -> Piece:
        """The rest, when no more tokens come."""
        if not self.stopped:
            self._held += self._rest_of_line()
        piece = self._release(len(self._held))
        if self.stopped:
            return piece
        said = tuple(said for _, said in self._tokens)
        self._tokens.clear()
        return Piece(piece.text, piece.said + said)

    def _rest_of_line(self) -> str:
        rest = self.tokenizer.decode(self._line)[self._taken :] if self._line else ""
        self._line, self._taken = [], 0
        return rest

    def _open_stop(self) -> int:
        """How many last characters could begin a stop string."""
        longest = max(map(len, self.stops), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops if len(stop) > length):
                return length
        return 0

    def _release(self, length: int) -> Piece:
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found and not self.stopped:
            self.stopped, length = True, min(found)
        text, self._held = self._held[:length], "" if self.stopped else self._held[length:]
        self._released += len(text)
        said = tuple(said for place, said in self._tokens if place < self._released)
        self._tokens = [] if self.stopped else [pair for pair in self._tokens if pair[0] >= self._released]
        return Piece(text, said)
