"""Conversations as they come from a file or a caller, checked once and then trusted.

The rules are those of the model's chat template, made strict: what the template would render into
something that teaches or asks for the wrong thing is refused, with the message and the place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mlx_afm.errors import DataError
from mlx_afm.spelling import nearest_name
from mlx_afm.text.content import Content, join_results, kind_of, parse_content
from mlx_afm.text.values import at, is_good_text, parse_arguments, present, refuse_in, require_json
from mlx_afm.text.weights import WEIGHT_KEYS, parse_weight

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"function": "tool", "developer": "system"}
_KEYS = {
    "system": ("role", "content", "response_format", "tools", *WEIGHT_KEYS),
    "user": ("role", "content", "response_format", *WEIGHT_KEYS),
    "assistant": ("role", "content", "tool_calls", *WEIGHT_KEYS),
    # `name` and `tool_call_id` are not rendered
    "tool": ("role", "content", "response_format", "name", "tool_call_id", *WEIGHT_KEYS),
}
_LISTS = ("tool_calls", "tools")  # an empty list means the same as no key


class Message(NamedTuple):
    """One checked message.

    Attributes:
        role: `system` (also `developer`), `user`, `assistant` or `tool` (also `function`).
        content: text; for a tool also its result as a dict, or new tool definitions as a list.
        tool_calls: calls of an assistant, `{"function": {"name", "arguments"}}` each.
        response_format: the JSON schema that the next answer must follow.
        tools: definitions of tools, on a system message.
        weight: loss weight of each token of an assistant message, if it is not 1; 0 means that it is not trained.
    """

    role: str
    content: Content
    tool_calls: tuple[dict[str, Any], ...] | None = None
    response_format: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    weight: float | None = None

    @property
    def loss_weight(self) -> float:
        """Loss weight of each token: that of the message for an assistant's, 0 for all others."""
        if self.role != "assistant":
            return 0.0
        return 1.0 if self.weight is None else self.weight


def to_dict(message: Message) -> dict[str, Any]:
    """The message as JSON has it; `parse_messages` gives the message again."""
    optional = {
        "tool_calls": None if message.tool_calls is None else list(message.tool_calls),
        "response_format": message.response_format,
        "tools": None if message.tools is None else list(message.tools),
        "weight": message.weight,
    }
    return {"role": message.role, "content": message.content, **present(optional)}


def parse_messages(
    value: object, *, where: object, special_pieces: Sequence[str] = (), joins_turns: bool = False
) -> tuple[Message, ...]:
    """The messages in a list of dicts; the dicts are left as they are.

    A key whose value is null is absent. Content may come in parts (`parse_content`). Several results of tools in a row
    are one message, a line each.

    Args:
        value: what the JSON line or the caller holds.
        where: named in errors, such as `train.jsonl, line 3`.
        special_pieces: pieces of the tokenizer that no text may spell out
            (`AFMTokenizer.special_pieces`); without them this is not checked.
        joins_turns: system messages become one, in front, and user or assistant messages in a row become one, their
            texts in order with an empty line between.

    Raises:
        DataError: every faulty message, a line each; or an order of roles that the model never saw.
    """
    if not isinstance(value, (list, tuple)):
        raise DataError(
            "not a conversation", kind="no-messages", where=where, expected="a list of messages", found=kind_of(value)
        )
    if (plain := _plain_messages(value, special_pieces)) is not None:
        return plain
    messages: list[Message] = []
    indices: list[int] = []  # of each message in `value`
    faults: list[DataError] = []
    for index, item in enumerate(value):
        place = at(where, f"message {index}")
        try:
            message = _parse_message(item, place)
            refuse_special(message, special_pieces, place)
        except DataError as error:
            faults.append(error)
            continue
        if joins_turns and message.role == "system" and messages:
            first = messages[0].role == "system"
            messages[:1] = [_joined_turns(messages[0], message)] if first else [message, *messages[:1]]
            indices[:0] = [] if first else [index]
            continue
        joined = _joined(messages[-1], message, joins_turns) if messages else None
        messages[-1:] = [joined] if joined else [*messages[-1:], message]
        indices += [] if joined else [index]
    if not faults:
        faults = list(_order_faults([message.role for message in messages], indices, where))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        details = [str(fault) for fault in faults]
        raise DataError(f"{len(faults)} faults in a conversation", where=where, details=details, faults=faults)
    return tuple(messages)


def parse_tools(value: object, *, where: object, special_pieces: Sequence[str] = ()) -> tuple[dict[str, Any], ...]:
    """The tool definitions in a list of dicts.

    Raises:
        DataError: not such a list, or a text in it spells out a special token.
    """
    tools = _dicts(value, "tools", where)
    refuse_in("tools", tools, special_pieces, where)
    return tools


def require_trainable(messages: Sequence[Message], where: object) -> None:
    """Raises DataError unless an answer is trained, every trained one says something, and one is the last message."""
    if not any(message.role == "assistant" for message in messages):
        raise DataError(
            "nothing to learn from: no assistant message",
            kind="no-answer",
            where=where,
            advice="Add the answer to be learned",
        )
    if not any(message.loss_weight for message in messages):
        raise DataError(
            "nothing to learn from: every assistant message has weight 0",
            kind="no-answer",
            where=where,
            advice="Give one a weight above 0 or drop the conversation",
        )
    if messages[-1].role != "assistant":
        raise DataError(
            "the conversation does not end with an answer",
            kind="no-final-answer",
            where=at(where, f"message {len(messages) - 1}"),
            expected="role 'assistant'",
            found=f"role {messages[-1].role!r}",
            advice="Add the answer or drop the messages after the last one",
        )
    for index, message in enumerate(messages):
        if message.loss_weight and not message.tool_calls and not str(message.content).strip():
            raise DataError(
                "an empty answer teaches the model to say nothing",
                kind="empty-answer",
                where=at(where, f"message {index}"),
                advice="Write the answer or drop the conversation",
            )


def refuse_special(message: Message, special_pieces: Sequence[str], where: object) -> None:
    """Raises DataError if any text of the message spells out one of the pieces."""
    refuse_in("content", message.content, special_pieces, where)
    calls = [(c["function"]["name"], parse_arguments(c["function"]["arguments"])) for c in message.tool_calls or ()]
    refuse_in("tool_calls", calls, special_pieces, where)
    refuse_in("response_format", message.response_format, special_pieces, where)
    refuse_in("tools", message.tools, special_pieces, where)


def _plain_messages(value: Sequence[Any], special_pieces: Sequence[str]) -> tuple[Message, ...] | None:
    """Messages that are nothing but roles and good texts in a good order, as most are; None: look closer."""
    roles, texts = [], []
    for item in value:
        if type(item) is not dict or len(item) != 2:
            return None
        role, content = item.get("role"), item.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        roles.append(role)
        texts.append(content)
    # All texts at once; should a piece come about between two of them, the closer look will not find it.
    if not _is_good_order(tuple(roles)) or not is_good_text("\n".join(texts), special_pieces):
        return None
    return tuple([Message(role, text) for role, text in zip(roles, texts)])


def _parse_message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(
            "not a message",
            kind="not-a-message",
            where=where,
            expected='{"role": ..., "content": ...}',
            found=kind_of(item),
        )
    item = {key: value for key, value in present(item).items() if not (key in _LISTS and value == [])}
    role = item.get("role")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        found = repr(item["role"]) if "role" in item else "no role"
        raise DataError(
            "unknown role", kind="unknown-role", where=where, expected=f"one of {', '.join(ROLES)}", found=found
        )
    if unknown := sorted(str(key) for key in item if key not in _KEYS[role]):
        raise _unknown_keys(unknown, role, where)
    optional: tuple[tuple[str, Callable[[Any, str], Any]], ...] = (
        ("tool_calls", _tool_calls),
        ("response_format", _response_format),
        ("tools", lambda value, place: _dicts(value, "tools", place)),
    )
    fields = {name: parse(item[name], where) for name, parse in optional if item.get(name) is not None}
    return Message(role, _content(item, role, where), **fields, weight=parse_weight(item, role, where))


def _unknown_keys(unknown: list[str], role: str, where: str) -> DataError:
    near = {key: nearest_name(key, _KEYS[role]) for key in unknown}
    meant = [f"Did you mean {name!r} for {key!r}?" for key, name in near.items() if name is not None]
    return DataError(
        f"unknown keys for role {role!r}: {', '.join(unknown)}",
        kind="unknown-key",
        where=where,
        expected=", ".join(_KEYS[role]),
        advice=" ".join([*meant, "They would have no effect; remove or rename them"]),
    )


def _joined(first: Message, second: Message, joins_turns: bool) -> Message | None:
    """Two results of tools in a row as one message, or two turns of any role; None if they stay apart."""
    if first.role != second.role or first.response_format is not None:
        return None
    if first.role != "tool":
        return _joined_turns(first, second) if joins_turns else None
    content = join_results(first.content, second.content)
    return None if content is None else second._replace(content=content)


def _joined_turns(first: Message, second: Message) -> Message:
    """Two messages of one role, whose contents are texts, as one."""
    content = "\n\n".join(str(text) for text in (first.content, second.content) if text)
    calls, tools = (first.tool_calls or ()) + (second.tool_calls or ()), (first.tools or ()) + (second.tools or ())
    return second._replace(content=content, tool_calls=calls or None, tools=tools or None)


def _content(item: dict[str, Any], role: str, where: str) -> Content:
    content = item.get("content")
    if content is None and role == "assistant" and item.get("tool_calls"):
        return ""  # a call without words is written either way
    return parse_content(content, role, where)


def _tool_calls(value: object, where: str) -> tuple[dict[str, Any], ...]:
    shape = '{"function": {"name": ..., "arguments": ...}} each'
    calls = tuple(map(present, _dicts(value, "tool_calls", where)))
    calls = tuple({**call, "function": present(call.get("function"))} for call in calls)
    for call in calls:
        function = call.get("function")
        known = set(call) <= {"function", "id", "type"} and call.get("type", "function") == "function"
        if not known or not isinstance(function, dict) or set(function) != {"name", "arguments"}:
            facts: dict[str, Any] = {"expected": shape, "found": json.dumps(call)[:120]}
            raise DataError("tool_calls has the wrong form", kind="wrong-tool-call", where=where, **facts)
        if not isinstance(function["name"], str) or not isinstance(function["arguments"], (str, dict)):
            expected = "a name that is a string and arguments that are JSON text or an object"
            facts = {"expected": expected, "found": json.dumps(call)[:120]}
            raise DataError("a tool call cannot be used", kind="wrong-tool-call", where=where, **facts)
        require_json(parse_arguments(function["arguments"]), "tool_calls", where, kind="wrong-tool-call")
    return calls


def _response_format(value: object, where: str) -> dict[str, Any]:
    expected = '{"type": "json_schema", "json_schema": {"name", "description", "schema"}}'
    facts: dict[str, Any] = {"expected": expected, "found": repr(value)[:120]}
    fault = DataError("response_format has the wrong form", kind="wrong-response-format", where=where, **facts)
    value = present(value)
    if not isinstance(value, dict) or set(value) != {"type", "json_schema"} or value["type"] != "json_schema":
        raise fault
    schema = value["json_schema"]
    if not isinstance(schema, dict) or not set(schema) <= {"name", "description", "schema", "strict"}:
        raise fault
    texts = (schema.get("name"), schema.get("description"))
    if not isinstance(schema.get("schema"), dict) or not all(isinstance(t, (str, type(None))) for t in texts):
        raise fault
    require_json(schema, "response_format", where)
    return value


def _dicts(value: object, name: str, where: object) -> tuple[dict[str, Any], ...]:
    kind = "wrong-tool-call" if name == "tool_calls" else "wrong-tools"
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        facts: dict[str, Any] = {"expected": "a list of objects", "found": kind_of(value)}
        raise DataError(f"{name} has the wrong form", kind=kind, where=where, **facts)
    if not value:
        return ()
    require_json(value, name, where, kind=kind)
    return tuple(value)


@lru_cache(maxsize=256)
def _is_good_order(roles: tuple[str, ...]) -> bool:
    return set(roles) <= set(ROLES) and not any(True for _ in _order_faults(roles, range(len(roles)), None))


def _order_faults(roles: Sequence[str], indices: Sequence[int], where: object) -> Iterator[DataError]:
    """What is wrong with the order of roles; `indices` are the messages' numbers for the errors."""
    if "user" not in roles:
        what = "no user message" if "assistant" in roles else "no user or assistant message"
        yield DataError(what, kind="no-messages", where=where, found=f"{len(roles)} messages")
        return
    # An assistant message may come first: a greeting.
    allowed = {
        "user": (None, "system", "assistant", "tool"),
        "assistant": (None, "system", "user", "tool"),
        "tool": ("assistant",),
    }
    before: str | None = None
    for index, role in zip(indices, roles):
        place = at(where, f"message {index}")
        if role == "system" and before is not None:
            advice = "Move it to the front"
            yield DataError("a system message can only be the first", kind="role-order", where=place, advice=advice)
            continue  # a misplaced one makes no other fault
        if role == before:
            advice = "Join them into one message"
            yield DataError(f"two {role} messages in a row", kind="role-order", where=place, advice=advice)
        elif role != "system" and before not in allowed[role]:
            expected = " or ".join(name for name in allowed[role] if name)
            facts: dict[str, Any] = {"expected": f"after {expected}", "found": f"after {before or 'nothing'}"}
            yield DataError(f"{role} message in the wrong place", kind="role-order", where=place, **facts)
        before = role
