"""Conversations to records of every data format; `data_formats` has the table of them and reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_afm.errors import DataError

Messages = Sequence[Mapping[str, Any]]


def write_record(messages: Messages, tools: Sequence[Any], text: str | None, data_format: str) -> Any:
    """The record of a data format that reads back as the same conversation.

    Whether it does is for the caller to see (`convert` does): an odd text may look like something else.

    Args:
        messages: checked messages as dicts (`to_dict`), the system message included if there is one.
        tools: tool definitions beside the messages.
        text: plain text, in place of messages.
        data_format: one of `DATA_FORMATS`.

    Raises:
        DataError: the data format cannot say this.
    """
    if (text is None) == (data_format == "text"):
        raise cannot_say(data_format, "plain text is no conversation, and the other way round")
    if data_format == "text":
        return {"text": text}
    return _WRITERS[data_format](messages, tools)


def cannot_say(data_format: str, reason: str) -> DataError:
    """The fault of a conversation that a data format has no words for."""
    advice = "Convert to messages, which holds every conversation" if data_format != "text" else None
    return DataError(f"the data format {data_format} cannot say this: {reason}", kind="not-expressible", advice=advice)


def _messages(messages: Messages, tools: Sequence[Any]) -> dict[str, Any]:
    return {"messages": list(messages), **_beside(tools)}


def _toolkit(messages: Messages, tools: Sequence[Any]) -> Any:
    return _messages(messages, tools) if tools else list(messages)


def _sharegpt(messages: Messages, tools: Sequence[Any]) -> dict[str, Any]:
    system, turns = _system(messages)
    own = system.pop("tools", ())
    if set(system) - {"content"}:
        raise cannot_say("sharegpt", "it has no place for response formats")
    head = {"system": system["content"]} if system else {}
    return {**head, "conversations": [_sharegpt_turn(turn) for turn in turns], **_beside(tools or own)}


def _sharegpt_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = {"user": "human", "assistant": "gpt", "tool": "observation"}[turn["role"]]
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    if calls := turn.get("tool_calls"):
        if turn["content"]:
            raise cannot_say("sharegpt", "a tool call has no place for words beside it")
        functions = [call["function"] for call in calls]
        return {"from": "function_call", "value": json.dumps(functions, ensure_ascii=False), **weight}
    if set(turn) - {"weight"} != {"role", "content"} or not isinstance(turn["content"], str):
        raise cannot_say("sharegpt", "it has no place for response formats, or results that are not text")
    return {"from": speaker, "value": turn["content"], **weight}


def _pair(data_format: str, answer: str) -> Callable[[Messages, Sequence[Any]], dict[str, Any]]:
    """Texts where there is one request and one answer that nobody takes for a list; else lists of messages."""

    def write(messages: Messages, tools: Sequence[Any]) -> dict[str, Any]:
        system, turns = _system(messages)
        texts = [message["content"] for message in messages]
        like_lists = "" in texts[:1] or any(str(text).startswith("[{") for text in texts)
        if len(turns) == 2 and set(system) <= {"content"} and _is_plain(turns) and not like_lists:
            head = {"system": system["content"]} if system else {}
            return {**head, "prompt": turns[0]["content"], answer: turns[1]["content"], **_beside(tools)}
        if not messages[:-1]:
            raise cannot_say(data_format, "it needs a request before the answer")
        return {"prompt": list(messages[:-1]), answer: list(messages[-1:]), **_beside(tools)}

    return write


def _instruction(messages: Messages, tools: Sequence[Any]) -> dict[str, Any]:
    system, turns = _system(messages)
    if tools or set(system) - {"content"} or not _is_plain(turns):
        raise cannot_say("instruction", "it has no place for tools, greetings, response formats or weights")
    texts = [turn["content"] for turn in turns]
    head = {"system": system["content"]} if system else {}
    history = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2])]
    earlier = {"history": history} if history else {}
    return {**head, "instruction": texts[-2], "input": "", "output": texts[-1], **earlier}


def _beside(tools: Sequence[Any]) -> dict[str, Any]:
    return {"tools": list(tools)} if tools else {}


def _system(messages: Messages) -> tuple[dict[str, Any], Messages]:
    """The system message without its role, empty if there is none; and the others."""
    if messages[0]["role"] != "system":
        return {}, messages
    return {key: value for key, value in messages[0].items() if key != "role"}, messages[1:]


def _is_plain(turns: Messages) -> bool:
    """Whether requests and answers take turns, and are nothing but texts."""
    roles = [turn["role"] for turn in turns]
    return roles == ["user", "assistant"] * (len(turns) // 2) and all(
        set(turn) == {"role", "content"} for turn in turns
    )


_WRITERS: dict[str, Callable[[Messages, Sequence[Any]], Any]] = {
    "toolkit": _toolkit,
    "messages": _messages,
    "prompt-completion": _pair("prompt-completion", "completion"),
    "prompt-response": _pair("prompt-response", "response"),
    "instruction": _instruction,
    "sharegpt": _sharegpt,
}
