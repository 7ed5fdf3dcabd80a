"""Requests on their way through the model's thread, and where their answers go."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_afm.generation.engine import STOP, Request, Row
from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.generation.text_stream import TextPiece, TextStream
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.metrics import Metrics


@dataclass(frozen=True)
class Delta:
    """More of a choice's text, and the tokens that begin in it."""

    index: int
    piece: TextPiece


@dataclass(frozen=True)
class End:
    """A choice is complete, after `tokens` tokens."""

    index: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failure:
    """There is no answer."""

    error: APIError


Event = Delta | End | Failure


class ChoiceSink:
    """Turns one choice's tokens into text and posts it; all calls come from the model's thread.

    Args:
        index: of the choice.
        text: of its tokens.
        post: takes events.
        metrics: what is counted.
        at_once: post text as it comes, not all at the end.
        echo: text that comes before the answer: its prompt's.
    """

    def __init__(
        self,
        index: int,
        text: TextStream,
        post: Callable[[Event], None],
        metrics: Metrics,
        *,
        at_once: bool,
        echo: str = "",
    ) -> None:
        self._index, self._text, self._post, self._metrics, self._at_once = index, text, post, metrics, at_once
        self._echo = echo
        self._started = time.perf_counter()
        self._pieces: list[TextPiece] = []
        self._tokens = 0
        self._done = False

    def start(self, row: Row) -> None:
        """The prompt was computed."""
        first = (TokenLogprob(row.request.ids[0]),) if row.prompt_logprobs else ()
        self._add(TextPiece(self._echo, (*first, *row.prompt_logprobs)))

    def add(self, token: TokenLogprob) -> bool:
        """Takes a token; True if the answer ends here."""
        if not self._tokens:
            self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)
        self._tokens += 1
        piece = self._text.add(token)
        if self._echo and token.logprob is not None and self._text.stopped and piece.tokens[-1:] != (token,):
            # The stop token too: who asks for log probabilities of a prompt counts one token behind it.
            piece = TextPiece(piece.text, (*piece.tokens, token))
        self._add(piece)
        return self._text.stopped

    def end(self, reason: str) -> None:
        """Completes the choice: `stop` or `length`. The token that ends an answer counts."""
        self._done = True
        self._add(self._text.finish())
        if self._pieces:
            tokens = tuple(token for piece in self._pieces for token in piece.tokens)
            self._post(Delta(self._index, TextPiece("".join(piece.text for piece in self._pieces), tokens)))
        self._metrics.add_request(time.perf_counter() - self._started)
        self._post(End(self._index, STOP if self._text.stopped else reason, self._tokens))

    def fail(self, error: APIError) -> None:
        """Tells that there is no answer, unless it is complete."""
        if not self._done:
            self._done = True
            self._post(Failure(error))

    def _add(self, piece: TextPiece) -> None:
        if not piece.text and not piece.tokens:
            return
        if self._at_once:
            self._post(Delta(self._index, piece))
        else:
            self._pieces.append(piece)


@dataclass(eq=False, kw_only=True)
class Job:
    """One prompt and as many answers as its request wants.

    Attributes:
        adapter: by name; None for the base.
        request: for the engine, with a sampler for each answer; its adapter is set when it starts.
        sinks: one for each answer.
        deadline: when to give up, on the clock of `time.monotonic`.
        cached_tokens: of the prompt, those that came from the prefix cache.
        cancelled: nobody waits for it any more.
    """

    adapter: str | None
    request: Request
    sinks: Sequence[ChoiceSink]
    deadline: float
    cached_tokens: int = 0
    cancelled: bool = False

    def fail(self, error: APIError) -> None:
        """Tells all that wait for an answer that there is none."""
        for sink in self.sinks:
            sink.fail(error)
