"""Records of every dialect to conversations; `dialect_writer` goes back.

| dialect | a record |
|---|---|
| `toolkit` | a list of messages, or an object whose first value is one |
| `messages` | `{"messages": [...], "tools": [...]}` |
| `prompt-completion` | `{"prompt", "completion"}`: texts, or lists of messages; optionally `"system"` |
| `prompt-response` | the same with `"response"` |
| `instruction` | `{"instruction", "input", "output"}`; optionally `"system"` and `"history"` (pairs) |
| `sharegpt` | `{"conversations": [{"from", "value"}, ...]}`; optionally `"system"` and `"tools"` |
| `text` | `{"text"}`: plain text, no conversation; all of it is trained |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_afm.data.json_text import parse_json
from mlx_afm.errors import DataError

# Tells the dialect of an object: the first of these whose keys are all there.
KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "prompt-response": ("prompt", "response"),
    "text": ("text",),
}
# The names that `fields` may give to columns.
FIELD_NAMES = (
    "messages",
    "tools",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "response",
    "system",
    "history",
    "text",
)
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """A record in the toolkit's terms, not yet checked.

    Attributes:
        messages: what should be a list of messages.
        tools: what should be a list of tool definitions.
        text: plain text, in place of messages.
        dialect: the form it was in.
    """

    messages: Any
    tools: Any = ()
    text: str | None = None
    dialect: str = "toolkit"


def read_record(value: object, dialect: str = "auto", fields: Sequence[tuple[str, str]] = ()) -> Conversation:
    """The conversation in a record.

    Args:
        value: the parsed JSON.
        dialect: one of the module's table, or "auto".
        fields: (name, column) pairs: use the object's `column` where the dialect says `name`.

    Raises:
        DataError: no dialect fits, or a field is missing or of the wrong type.
    """
    if isinstance(value, list) and dialect in ("auto", "toolkit"):
        return Conversation(value)
    if not isinstance(value, dict):
        expected = "a list of messages or an object" if dialect == "auto" else f"a record of the dialect {dialect}"
        raise DataError("not a record", kind="unknown-form", expected=expected, found=_kind(value))
    record = {**value, **{name: value[column] for name, column in fields if column in value}}
    dialect = _dialect_of(record) if dialect == "auto" else dialect
    if missing := [key for key in KEYS.get(dialect, ()) if key not in record]:
        raise DataError(
            f"no field {' and no field '.join(map(repr, missing))}",
            kind="unknown-form",
            expected=f"a record of the dialect {dialect}",
            found=f"fields {', '.join(map(repr, value)) or 'none'}"[:200],
        )
    if absent := [column for name, column in fields if column not in value and name not in value]:
        found = f"columns {', '.join(map(repr, value)) or 'none'}"[:200]
        expected = f"a record with {', '.join(column for _, column in fields)}"
        raise DataError(f"no column {absent[0]!r}", kind="unknown-form", expected=expected, found=found)
    return _READERS[dialect](record)


def _dialect_of(record: Mapping[str, Any]) -> str:
    for dialect, keys in KEYS.items():
        if all(key in record for key in keys):
            return dialect
    if isinstance(next(iter(record.values()), None), list):
        return "toolkit"
    raise DataError(
        "no messages: a record of no dialect we know",
        kind="unknown-form",
        expected="messages, conversations, instruction and output, prompt and completion or response, or text",
        found=f"fields {', '.join(map(repr, record)) or 'none'}"[:200],
        advice="Name the fields with --field, such as --field prompt=question",
    )


def _toolkit(record: dict[str, Any]) -> Conversation:
    return Conversation(next(iter(record.values()), None), _parsed(record.get("tools")), dialect="toolkit")


def _messages(record: dict[str, Any]) -> Conversation:
    return Conversation(_parsed(record["messages"]), _parsed(record.get("tools")), dialect="messages")


def _pair(answer: str, dialect: str) -> Callable[[dict[str, Any]], Conversation]:
    def read(record: dict[str, Any]) -> Conversation:
        messages = [
            *_system(record),
            *_turn("user", record["prompt"], "prompt"),
            *_turn("assistant", record[answer], answer),
        ]
        return Conversation(messages, _parsed(record.get("tools")), dialect=dialect)

    return read


def _instruction(record: dict[str, Any]) -> Conversation:
    texts = [_text(record["instruction"], "instruction"), _text(record.get("input") or "", "input")]
    messages = _system(record)
    history = _parsed(record.get("history"))
    if not isinstance(history, (list, tuple)) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("history has the wrong form", kind="wrong-field", expected="a list of [request, answer]")
    for request, answer in history:
        messages += [*_turn("user", request, "history"), *_turn("assistant", answer, "history")]
    messages += _turn("user", "\n\n".join(text for text in texts if text), "instruction")
    return Conversation([*messages, *_turn("assistant", record["output"], "output")], dialect="instruction")


def _sharegpt(record: dict[str, Any]) -> Conversation:
    turns = _parsed(record["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("conversations has the wrong form", kind="no-messages", expected="a list of turns")
    messages = [*_system(record), *(_from_sharegpt(turn, index) for index, turn in enumerate(turns))]
    return Conversation(messages, _parsed(record.get("tools")), dialect="sharegpt")


def _from_sharegpt(turn: dict[str, Any], index: int) -> dict[str, Any]:
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        expected = f"one of {', '.join(SHAREGPT_ROLES)}"
        found = repr(speaker) if speaker is not None else "no 'from'"
        raise DataError("unknown role", kind="unknown-role", where=f"message {index}", expected=expected, found=found)
    if speaker != "function_call":
        return {"role": role, "content": content}
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": [{"function": call} for call in calls]}


def _plain_text(record: dict[str, Any]) -> Conversation:
    text = _text(record["text"], "text")
    if not text.strip():
        raise DataError("an empty text", kind="empty-answer", advice="Drop the record")
    return Conversation([], text=text, dialect="text")


_READERS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "toolkit": _toolkit,
    "messages": _messages,
    "prompt-completion": _pair("completion", "prompt-completion"),
    "prompt-response": _pair("response", "prompt-response"),
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}
DIALECTS = tuple(_READERS)


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = record.get("system")
    return [{"role": "system", "content": _text(system, "system")}] if system else []


def _turn(role: str, value: Any, field: str) -> list[Any]:
    if isinstance(value, list):
        return value
    text = _text(value, field)
    messages = _parsed(text) if text.startswith("[{") and '"role"' in text else None
    if isinstance(messages, list) and all(isinstance(item, dict) and "role" in item for item in messages):
        return messages
    return [{"role": role, "content": text}]


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} is not text", kind="wrong-field", expected="a string", found=_kind(value))
    return value


def _parsed(value: Any) -> Any:
    """Tables hold lists as JSON text; text that is no JSON list or object stays as it is."""
    if value is None or value == "":
        return ()
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except DataError as error:
            if error.kind != "bad-json":
                raise
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
