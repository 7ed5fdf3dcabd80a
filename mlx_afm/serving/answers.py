"""Answers of /v1/chat/completions and /v1/completions: one object, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_afm.files import to_json
from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.jobs import Delta, End
from mlx_afm.serving.requests import CompletionRequest
from mlx_afm.text.token_names import TokenNames
from mlx_afm.text.tool_calls import Parsed, ToolCallParser, ToolCallTokenFilter, is_open_block

DONE = b"data: [DONE]\n\n"


class ChoiceParser:
    """Takes tool calls, and their special tokens, out of one choice's text.

    Args:
        asked: the request.

    Attributes:
        calls: found so far.
    """

    def __init__(self, asked: CompletionRequest) -> None:
        self._parser = ToolCallParser() if asked.tools else None
        self._filter = ToolCallTokenFilter() if asked.chat else None
        self._one_call = asked.one_call
        self.calls: list[dict[str, Any]] = []

    def feed(self, text: str) -> Parsed:
        """What became certain with more text."""
        parsed = Parsed(text, []) if self._parser is None else self._parser.feed(text)
        return self._kept(parsed if self._filter is None else Parsed(self._filter.push(parsed.content), parsed.calls))

    def finish(self, reason: str) -> tuple[Parsed, str]:
        """The rest, and why the choice ended."""
        complete = bool(self.calls)
        rest = Parsed("", []) if self._parser is None else self._parser.finish()
        if self._filter is not None:
            content = "" if is_open_block(rest.content) else rest.content  # a call that was cut off
            rest = Parsed(self._filter.push(content) + self._filter.finish(), rest.calls)
        rest = self._kept(rest)
        return rest, "tool_calls" if self.calls and (complete or reason != "length") else reason

    def _kept(self, parsed: Parsed) -> Parsed:
        room = max(1 - len(self.calls), 0) if self._one_call else None
        calls = parsed.calls[:room]
        self.calls += calls
        return Parsed(parsed.content, calls)


@dataclass
class AnswerChoice:
    """One choice so far.

    Attributes:
        parser: of its text.
        text: without tool calls.
        tokens: with their log probabilities, if these were asked for.
        reason: why it ended, once it has.
    """

    parser: ChoiceParser
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None


class AnswerBuilder:
    """Puts an answer together from events, and gives it whole or in chunks.

    Args:
        asked: the request.
        names: of tokens, for log probabilities.

    Attributes:
        cached_tokens: of the prompts, those that came from the prefix cache.
    """

    def __init__(self, asked: CompletionRequest, names: TokenNames) -> None:
        self._asked, self._names = asked, names
        self._choices = [AnswerChoice(ChoiceParser(asked)) for _ in range(len(asked.prompts) * asked.choices)]
        self._tokens = self.cached_tokens = 0
        prefix, self._kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason is not None for choice in self._choices)

    def first_events(self) -> Iterator[bytes]:
        """What a stream begins with: the role of each choice."""
        if self._asked.chat:
            for index in range(len(self._choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def events(self, event: Delta | End) -> Iterator[bytes]:
        """Takes an event; gives what a stream sends for it."""
        choice = self._choices[event.index]
        if isinstance(event, Delta):
            yield from self._add(event.index, choice.parser.feed(event.piece.text), event.piece.tokens)
            return
        self._tokens += event.tokens
        rest, choice.reason = choice.parser.finish(event.reason)
        yield from self._add(event.index, rest)
        yield self._chunk(event.index, {}, reason=choice.reason)

    def last_events(self) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._asked.usage:
            yield _event({**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage()})
        yield DONE

    def error_events(self, error: APIError) -> Iterator[bytes]:
        """How a stream ends that cannot go on."""
        yield _event(error.to_json())

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts; those of the answer count the stop token."""
        prompt = sum(len(prompt.ids) for prompt in self._asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _add(self, index: int, parsed: Parsed, tokens: Sequence[TokenLogprob] = ()) -> Iterator[bytes]:
        """Chunks for more text and calls."""
        choice = self._choices[index]
        offset, choice.text = len(choice.text), choice.text + parsed.content
        choice.tokens += tokens
        if parsed.content or tokens:
            yield self._chunk(index, {"content": parsed.content}, tokens=tokens, offset=offset)
        first = len(choice.parser.calls) - len(parsed.calls)
        for number, call in enumerate(parsed.calls, start=first):
            yield self._chunk(index, {"tool_calls": [{"index": number, **call}]})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[TokenLogprob] = (),
        offset: int = 0,
        reason: str | None = None,
    ) -> bytes:
        """One chunk; nothing for an answer that is told whole."""
        if not self._asked.stream:
            return b""
        logprobs = self._logprobs(tokens, offset) if tokens else None
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        choice |= {"delta": delta} if self._asked.chat else {"text": delta.get("content", "")}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return _event({**chunk, "usage": None} if self._asked.usage else chunk)

    def _choice(self, index: int, choice: AnswerChoice) -> dict[str, Any]:
        wanted = self._asked.sampler.top_logprobs is not None
        end = {
            "index": index,
            "logprobs": self._logprobs(choice.tokens, 0) if wanted else None,
            "finish_reason": choice.reason,
        }
        if not self._asked.chat:
            return {**end, "text": choice.text}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.parser.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.parser.calls}
        return {**end, "message": message}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        if self._asked.chat:
            return {"content": token_logprobs(tokens, self._names), "refusal": None}
        texts = [self._names.describe(token.token)[0] for token in tokens]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        tops = [
            None if item.logprob is None else {self._names.describe(token)[0]: value for token, value in item.top}
            for item in tokens
        ]
        values = [token.logprob for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def token_logprobs(tokens: Sequence[TokenLogprob], names: TokenNames) -> list[dict[str, Any]]:
    """Log probabilities of tokens as chat completions and responses write them."""

    def described(token: int, logprob: float | None) -> dict[str, Any]:
        text, data = names.describe(token)
        return {"token": text, "logprob": logprob, "bytes": data}

    return [
        {**described(token.token, token.logprob), "top_logprobs": [described(*other) for other in token.top]}
        for token in tokens
    ]


def _event(value: Any) -> bytes:
    return f"data: {to_json(value, ascii_only=True)}\n\n".encode()
