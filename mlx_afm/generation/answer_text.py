"""Tokens to the text of an answer, piece by piece, up to where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_afm.text.tokenizer import AFMTokenizer

STOP, LENGTH = "stop", "length"  # why an answer ended
UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


class AnswerText:
    """One answer as it comes.

        text = AnswerText(tokenizer, stop=("END",))
        text.add(token)      "what is certain by now"
        text.end()           "what was held back"

    Text is held back while it may be the beginning of a stop text, or is not a whole character. What it gives out
    does not depend on how the text is cut into tokens. mlx-lm's detokenizer decodes a line anew for each token and
    knows no stop texts.

    Attributes:
        stopped: whether an end token or a stop text was met; the answer is over, and `add` gives nothing more.
    """

    def __init__(self, tokenizer: AFMTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._pending: list[int] = []  # tokens that are no whole characters yet
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after this token."""
        if self.stopped:
            return ""
        if token in self._tokenizer.eos_token_ids:
            text = self.end()
            self.stopped = True
            return text
        if token < self._tokenizer.vocab_size:  # the embedding may have more rows, which have no text
            self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(UNFINISHED):
            return ""
        self._pending.clear()
        return self._certain(text)

    def end(self) -> str:
        """What was held back, when no token follows."""
        text = self._certain(self._tokenizer.decode(self._pending))
        rest, self._held, self._pending = self._held, "", []
        return text + ("" if self.stopped else rest)

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
        """Length of the longest end of the text that begins a stop text."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
