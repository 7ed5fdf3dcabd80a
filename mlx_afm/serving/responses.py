"""POST /v1/responses: its requests as conversations, its answers whole and as events. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_afm.files import to_json
from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.serving.answers import ChoiceParser, token_logprobs
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.bodies import (
    CallItem,
    CallOutputItem,
    FlatNamedTool,
    FlatSchemaFormat,
    FlatTool,
    InputItem,
    MessageItem,
    NamedTool,
    ResponseFormat,
    ResponsesBody,
    SchemaFormat,
    TextPart,
    Tool,
    ToolChoice,
)
from mlx_afm.serving.jobs import Delta, End
from mlx_afm.serving.requests import CompletionRequest, Reader
from mlx_afm.text.token_names import TokenNames
from mlx_afm.text.tool_calls import Parsed

LOGPROBS = "message.output_text.logprobs"


def read_response(body: ResponsesBody, reader: Reader) -> CompletionRequest:
    """What a request of /v1/responses asks for.

    Raises:
        APIError: see `Reader.chat`.
    """
    faults = reader.sampling_faults(body)
    if body.max_output_tokens == 0:
        faults.append(("max_output_tokens", "expected -1 or at least 1, found 0"))
    told = LOGPROBS in (body.include or [])
    if body.top_logprobs is not None and not told:
        faults.append(("top_logprobs", f'expected include to contain "{LOGPROBS}" with it'))
    if body.stream_options is not None and not body.stream:
        faults.append(("stream_options", "expected stream to be true with it"))
    first: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields = {
        "model": body.model,
        "sampler": reader.sampler(body, (body.top_logprobs or 0) if told else None),
        "stream": bool(body.stream),
        "max_tokens": body.max_output_tokens,
    }
    return reader.conversation(
        first + _messages(body.input),
        tools=[_tool(tool) for tool in body.tools or []],
        tool_choice=_tool_choice(body),
        parallel=body.parallel_tool_calls is not False,
        form=_form(body),
        faults=faults,
        fields=fields,
    )


def _messages(items: list[InputItem]) -> list[dict[str, Any]]:
    """Items as chat messages: calls in a row belong to the assistant message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, MessageItem):
            texts = [part.text if isinstance(part, TextPart) else part.refusal for part in item.content]
            messages.append({"role": item.role, "content": "".join(texts)})
        elif isinstance(item, CallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = {"type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif isinstance(item, CallOutputItem):
            text = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in item.output)
            messages.append({"role": "tool", "content": text, "tool_call_id": item.call_id})
    return messages


def _tool(tool: FlatTool) -> Tool:
    """A tool in the form of chat completions."""
    return Tool.model_validate({"type": "function", "function": {k: v for k, v in tool.given.items() if k != "type"}})


def _tool_choice(body: ResponsesBody) -> ToolChoice | None:
    if isinstance(body.tool_choice, FlatNamedTool):
        return NamedTool.model_validate({"type": "function", "function": {"name": body.tool_choice.name}})
    return body.tool_choice


def _form(body: ResponsesBody) -> ResponseFormat | None:
    form = None if body.text is None else body.text.format
    if not isinstance(form, FlatSchemaFormat):
        return form
    named = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return SchemaFormat.model_validate({"type": "json_schema", "json_schema": named})


@dataclass
class _Item:
    """An output item that is being written: a message, or a call of a tool."""

    item: dict[str, Any]
    tokens: list[TokenLogprob] = field(default_factory=list)


class ResponseBuilder:
    """Puts an answer together from events, and gives it whole or as events.

    Args:
        body: the request, which the answer repeats.
        asked: the same as it was read.
        names: of tokens, for log probabilities.

    Attributes:
        cached_tokens: of the prompt, those that came from the prefix cache.
    """

    def __init__(self, body: ResponsesBody, asked: CompletionRequest, names: TokenNames) -> None:
        self._asked, self._names, self._parser = asked, names, ChoiceParser(asked)
        self._items: list[_Item] = []
        self._message: _Item | None = None  # that is not complete
        self._sequence = self._tokens = self.cached_tokens = 0
        self._reason: str | None = None
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        sampling = asked.sampler.config
        self._head = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": body.model,
            "parallel_tool_calls": not asked.one_call,
            "previous_response_id": None,
            "reasoning": None,
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temp,
            "text": {"format": _repeated_format(body)},
            "tool_choice": _repeated(body.tool_choice) or "auto",
            "tools": [tool.given for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    @property
    def complete(self) -> bool:
        """Whether the answer has ended."""
        return self._reason is not None

    def first_events(self) -> Iterator[bytes]:
        """What a stream begins with."""
        yield self._event("response.created", response=self.whole())
        yield self._event("response.in_progress", response=self.whole())

    def events(self, event: Delta | End) -> Iterator[bytes]:
        """Takes an event; gives what a stream sends for it."""
        if isinstance(event, Delta):
            yield from self._add(self._parser.feed(event.piece.text), event.piece.tokens)
            return
        self._tokens += event.tokens
        rest, reason = self._parser.finish(event.reason)
        yield from self._add(rest, [])
        self._status = "incomplete" if reason == "length" else "completed"
        if not self._items:
            yield from self._begin_message()
        yield from self._end_message()
        self._reason = reason

    def last_events(self) -> Iterator[bytes]:
        """What a stream ends with."""
        yield self._event(f"response.{self._status}", response=self.whole())

    def error_events(self, error: APIError) -> Iterator[bytes]:
        """How a stream ends that cannot go on."""
        code = error.code or "server_error"
        self._status, self._error = "failed", {"code": code, "message": str(error)}
        yield self._event("error", code=code, message=str(error), param=error.param)
        yield self._event("response.failed", response=self.whole())

    def whole(self) -> dict[str, Any]:
        """The answer, as far as it has come, as one object."""
        ended = self._status != "in_progress"
        return {
            **self._head,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "output": [item.item for item in self._items],
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.ids) for prompt in self._asked.prompts)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + self._tokens,
        }

    def _add(self, parsed: Parsed, tokens: Any) -> Iterator[bytes]:
        if parsed.content or tokens:
            if self._message is None:
                yield from self._begin_message()
            assert self._message is not None
            self._message.tokens += tokens
            self._message.item["content"][0]["text"] += parsed.content
            if self._asked.stream:
                logprobs = token_logprobs(tokens, self._names)
                yield self._in_message("response.output_text.delta", delta=parsed.content, logprobs=logprobs)
        for call in parsed.calls:
            yield from self._end_message()
            yield from self._call(call)

    def _begin_message(self) -> Iterator[bytes]:
        item: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(24)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._message = _Item(item)
        self._items.append(self._message)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        yield self._in_message("response.content_part.added", part=item["content"][0])

    def _end_message(self) -> Iterator[bytes]:
        if self._message is None:
            return
        item, part = self._message.item, self._message.item["content"][0]
        part["logprobs"] = token_logprobs(self._message.tokens, self._names)
        item["status"] = "incomplete" if self._status == "incomplete" else "completed"
        yield self._in_message("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._in_message("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._message = None

    def _call(self, call: dict[str, Any]) -> Iterator[bytes]:
        function = call["function"]
        item = {
            "id": f"fc_{secrets.token_hex(24)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call["id"],
            "name": function["name"],
            "arguments": "",
        }
        self._items.append(_Item(item))
        place = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", **place, item=item)
        within, name = {"item_id": item["id"], **place}, "response.function_call_arguments"
        yield self._event(f"{name}.delta", **within, delta=function["arguments"])
        yield self._event(f"{name}.done", **within, name=function["name"], arguments=function["arguments"])
        item |= {"arguments": function["arguments"], "status": "completed"}
        yield self._event("response.output_item.done", **place, item=item)

    def _in_message(self, name: str, /, **fields: Any) -> bytes:
        assert self._message is not None
        place = {"item_id": self._message.item["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(name, **place, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        """One event; nothing for an answer that is told whole."""
        if not self._asked.stream:
            return b""
        value = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {name}\ndata: {to_json(value, ascii_only=True)}\n\n".encode()


def _repeated(value: Any) -> Any:
    return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value


def _repeated_format(body: ResponsesBody) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    found: dict[str, Any] = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    return found
