"""From the model's thread to the connection's: what an answer says, as events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_afm.serving.jobs import Said
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.refusal import Refusal
from mlx_afm.serving.text import Piece, TextStream


@dataclass(frozen=True)
class Delta:
    """More of a choice's text, and the tokens that begin in it."""

    index: int
    piece: Piece


@dataclass(frozen=True)
class End:
    """A choice is complete, after `tokens` tokens."""

    index: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failure:
    """There is no answer."""

    error: Refusal


Event = Delta | End | Failure


class ChoiceSink:
    """Turns one choice's tokens into text and posts it.

    Args:
        index: of the choice.
        text: of its tokens.
        post: takes events, from the model's thread.
        metrics: what is counted.
        at_once: post text as it comes, not all at the end.
    """

    def __init__(
        self, index: int, text: TextStream, post: Callable[[Event], None], metrics: Metrics, *, at_once: bool
    ) -> None:
        self._index, self._text, self._post, self._metrics, self._at_once = index, text, post, metrics, at_once
        self._started = time.perf_counter()
        self._pieces: list[Piece] = []
        self._tokens = 0
        self._done = False

    def token(self, said: Said) -> bool:
        """See `jobs.Sink`."""
        if not self._tokens:
            self._metrics.observe("first_token_seconds", time.perf_counter() - self._started)
        self._tokens += 1
        self._add(self._text.push(said))
        return self._text.stopped

    def end(self, reason: str, tokens: int) -> None:
        """See `jobs.Sink`."""
        self._done = True
        self._add(self._text.finish())
        if self._text.stopped:
            reason = "stop"
        if self._pieces:
            said = tuple(said for piece in self._pieces for said in piece.said)
            self._post(Delta(self._index, Piece("".join(piece.text for piece in self._pieces), said)))
        self._metrics.observe("request_seconds", time.perf_counter() - self._started)
        self._post(End(self._index, reason, tokens))

    def fail(self, error: Refusal) -> None:
        """See `jobs.Sink`."""
        if not self._done:
            self._done = True
            self._post(Failure(error))

    def _add(self, piece: Piece) -> None:
        if not piece.text and not piece.said:
            return
        if self._at_once:
            self._post(Delta(self._index, piece))
        else:
            self._pieces.append(piece)
