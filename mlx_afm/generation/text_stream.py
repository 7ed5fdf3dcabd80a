"""Tokens to the text of an answer, piece by piece, up to where it ends.

The rule of stop strings, for every caller: the answer ends with the first character that completes one of them, and of
several that this character completes the longest counts. Neither the stop string nor what follows is part of the
answer. So what a stream gives out does not depend on how the text is cut into tokens, and no token is generated after
the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.text.tokenizer import AFMTokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


@dataclass(frozen=True)
class TextPiece:
    """Text that is certain, and the tokens that begin in it, if the stream keeps them."""

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()


class TextStream:
    """One answer as it comes.

        stream = TextStream(tokenizer, stop=("END",))
        stream.add(token).text      text that is certain by now
        stream.finish().text        what was held back, when no token follows

    Text is held back while it may be the beginning of a stop string, or is not a whole character.

    Args:
        tokenizer: the model's.
        stop: strings that end the answer.
        keeps_tokens: give tokens with the text that they begin in.

    Cost: each token is decoded once, with those before it that are no whole character yet. mlx-lm decodes the whole
        line anew for each token.

    Example: with stop "abcd" and "bc" the tokens `x`, `ab`, `cd` give "xa": the `c` completes "bc". With stop "abc" and
        "b" the tokens `x`, `abc` give "xa": "b" is complete before "abc" is.

    Attributes:
        stopped: whether a stop token or a stop string was met; the answer is over, and `add` gives nothing more.
    """

    def __init__(self, tokenizer: AFMTokenizer, stop: Sequence[str] = (), *, keeps_tokens: bool = False) -> None:
        self._tokenizer, self._stop, self._keeps_tokens = tokenizer, tuple(stop), keeps_tokens
        self._pending: list[int] = []  # tokens that are no whole characters yet
        self._held = ""
        self._released = 0  # characters given out
        self._tokens: list[tuple[int, TokenLogprob]] = []  # each with the place where its text begins
        self.stopped = False

    def add(self, token: TokenLogprob | int) -> TextPiece:
        """The text that is certain after this token."""
        if self.stopped:
            return TextPiece()
        if isinstance(token, int):
            token = TokenLogprob(token)
        if self._keeps_tokens:
            self._tokens.append((self._released + len(self._held), token))
        if token.token in self._tokenizer.eos_token_ids:
            text, self.stopped = self._rest(), True
            return self._release(text)
        if token.token < self._tokenizer.vocab_size:  # the embedding may have more rows, which have no text
            self._pending.append(token.token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(UNFINISHED):
            return self._release("")
        self._pending.clear()
        return self._release(self._certain(text))

    def finish(self) -> TextPiece:
        """What was held back, when no token follows."""
        over = self.stopped
        piece = self._release("" if over else self._rest())
        rest = () if over or self.stopped else tuple(token for _, token in self._tokens)
        self._tokens = []
        return TextPiece(piece.text, piece.tokens + rest)

    def _rest(self) -> str:
        text = self._certain(self._tokenizer.decode(self._pending))
        rest, self._held, self._pending = self._held, "", []
        return text if self.stopped else text + rest

    def _certain(self, text: str) -> str:
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            whole, self._held = self._held[: min(ends)[1]], ""
            return whole
        length = len(self._held) - self._open_length()
        whole, self._held = self._held[:length], self._held[length:]
        return whole

    def _open_length(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, text: str) -> TextPiece:
        """Gives text out, and the tokens that begin in it."""
        self._released += len(text)
        if not self._keeps_tokens:
            return TextPiece(text)
        tokens = tuple(token for place, token in self._tokens if place < self._released)
        self._tokens = [] if self.stopped else [pair for pair in self._tokens if pair[0] >= self._released]
        return TextPiece(text, tokens)
