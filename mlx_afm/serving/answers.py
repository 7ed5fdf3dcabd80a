"""OpenAI's answers: one object, or the chunks of a stream."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.serving.jobs import Delta, End
from mlx_afm.serving.requests import CompletionRequest
from mlx_afm.text.sentencepiece_model import SPACE
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.tool_calls import MarkFilter, Parsed, ToolCallParser, is_open_block

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


@dataclass
class Choice:
    """One choice so far.

    Attributes:
        text: what was told as text.
        tokens: with their log probabilities, if these were asked for.
        calls: tool calls.
        reason: why it ended, once it has.
        parser: takes tool calls out of the text, if there may be any.
        marks: takes marks out of the content of a chat.
    """

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    parser: ToolCallParser | None = None
    marks: MarkFilter | None = None


class AnswerBuilder:
    """Puts an answer together from events, and says it whole or in chunks.

    Args:
        asked: the request.
        names: of tokens, for log probabilities.
    """

    def __init__(self, asked: CompletionRequest, names: TokenNames) -> None:
        self._asked, self._names = asked, names
        count = len(asked.prompts) * asked.choices
        self._choices = [
            Choice(parser=ToolCallParser() if asked.tools else None, marks=MarkFilter() if asked.chat else None)
            for _ in range(count)
        ]
        self._tokens = self.cached_tokens = 0
        prefix, kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        self._kind = kind
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason is not None for choice in self._choices)

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: the role of each choice."""
        if self._asked.chat:
            for index in range(len(self._choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def take(self, event: Delta | End) -> Iterator[dict[str, Any]]:
        """Takes an event; gives the chunks that a stream says for it."""
        choice = self._choices[event.index]
        if isinstance(event, Delta):
            text = event.piece.text
            parsed = Parsed(text, []) if choice.parser is None else choice.parser.feed(text)
            if choice.marks is not None:
                parsed = Parsed(choice.marks.push(parsed.content), parsed.calls)
            yield from self._tell(event.index, parsed, event.piece.tokens)
            return
        self._tokens += event.tokens
        choice.reason = event.reason
        yield from self._end(event.index, choice)

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts; those of the answer count the mark of its end."""
        prompt = sum(len(prompt.ids) for prompt in self._asked.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that was asked for counts."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _tell(self, index: int, parsed: Parsed, tokens: Sequence[TokenLogprob] = ()) -> Iterator[dict[str, Any]]:
        """Chunks for more text and calls."""
        choice = self._choices[index]
        offset, choice.text = len(choice.text), choice.text + parsed.content
        choice.tokens += tokens
        if parsed.content or tokens:
            yield self._chunk(index, {"content": parsed.content}, tokens=tokens, offset=offset)
        for call in parsed.calls:
            if not (choice.calls and self._asked.one_call):
                yield self._chunk(index, {"tool_calls": [{"index": len(choice.calls), **call}]})
                choice.calls.append(call)

    def _end(self, index: int, choice: Choice) -> Iterator[dict[str, Any]]:
        complete = bool(choice.calls)
        rest = Parsed("", []) if choice.parser is None else choice.parser.finish()
        if choice.marks is not None:
            content = "" if is_open_block(rest.content) else rest.content  # a call that was cut off
            rest = Parsed(choice.marks.push(content) + choice.marks.finish(), rest.calls)
        yield from self._tell(index, rest)
        if choice.calls and (complete or choice.reason != "length"):
            choice.reason = "tool_calls"
        yield self._chunk(index, {}, reason=choice.reason)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        tokens: Sequence[TokenLogprob] = (),
        offset: int = 0,
        reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, offset) if tokens else None
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        choice |= {"delta": delta} if self._asked.chat else {"text": delta.get("content", "")}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._asked.usage else chunk

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        told = self._asked.sampler.top_logprobs is not None
        end = {
            "index": index,
            "logprobs": self._logprobs(choice.tokens, 0) if told else None,
            "finish_reason": choice.reason,
        }
        if not self._asked.chat:
            return {**end, "text": choice.text}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {**end, "message": message}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        if self._asked.chat:
            return {"content": [self._told(token.token, token.logprob, token.top) for token in tokens], "refusal": None}
        texts = [self._names.describe(token.token)[0] for token in tokens]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        tops = [{self._names.describe(token)[0]: value for token, value in item.top} for item in tokens]
        values = [token.logprob for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _told(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        text, data = self._names.describe(token)
        alternatives = []
        for other, value in top:
            name, other_bytes = self._names.describe(other)
            alternatives.append({"token": name, "logprob": value, "bytes": other_bytes})
        return {"token": text, "logprob": logprob, "bytes": data, "top_logprobs": alternatives}
