"""Records of every data format to conversations; `data_format_writer` goes back.

| data format | a record |
|---|---|
| `toolkit` | a list of messages, or an object whose first value is one |
| `messages` | `{"messages": [...], "tools": [...]}` |
| `prompt-completion` | `{"prompt", "completion"}`: texts, or lists of messages; optionally `"system"` |
| `prompt-response` | the same with `"response"` |
| `instruction` | `{"instruction", "input", "output"}`; optionally `"system"`, `"tools"` and `"history"` (pairs) |
| `sharegpt` | `{"conversations": [{"from", "value"}, ...]}`; optionally `"system"` and `"tools"` |
| `text` | `{"text"}`: plain text, no conversation; all of it is trained |

A string is text, also where it holds JSON. There are two exceptions. `tools` and the value of a `function_call` may be
JSON text, as in many ShareGPT files: they have no other meaning. A cell of a table may hold the JSON of a list
(`parse_cells`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_afm.data.json_text import parse_json
from mlx_afm.errors import DataError

# Tells the data format of an object: the first of these whose keys are all there.
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
    "developer": "system",
    "function": "tool",
}
LIST_FIELDS = ("messages", "conversations", "tools", "history")  # never a plain text
ANSWERS = ("completion", "response")


@dataclass(frozen=True)
class Conversation:
    """A record in the toolkit's terms, not yet checked.

    Attributes:
        messages: what should be a list of messages.
        tools: what should be a list of tool definitions.
        text: plain text, in place of messages.
        data_format: the form it was in.
    """

    messages: Any
    tools: Any = ()
    text: str | None = None
    data_format: str = "toolkit"


def read_record(
    value: object, data_format: str = "auto", fields: Sequence[tuple[str, str]] = (), *, in_table: bool = False
) -> Conversation:
    """The conversation in a record. A field that is null is absent.

    Args:
        value: the parsed JSON.
        data_format: one of the module's table, or "auto".
        fields: (name, column) pairs: use the object's `column` where the data format says `name`.
        in_table: the record is a row of a table, see `parse_cells`.

    Raises:
        DataError: no data format fits, or a field is missing or of the wrong type.
    """
    if isinstance(value, list) and data_format in ("auto", "toolkit"):
        _refuse_records(value)
        return Conversation(value)
    if not isinstance(value, dict):
        expected = "a list of messages or an object" if data_format == "auto" else f"a {data_format} record"
        raise DataError("not a record", kind="unknown-form", expected=expected, found=_kind(value))
    cells = parse_cells(value, fields) if in_table else value
    record = {**cells, **{name: cells[column] for name, column in fields if column in cells}}
    data_format = _data_format_of(record) if data_format == "auto" else data_format
    if missing := [key for key in KEYS.get(data_format, ()) if key not in record]:
        raise DataError(
            f"no field {' and no field '.join(map(repr, missing))}",
            kind="unknown-form",
            expected=f"a {data_format} record",
            found=f"fields {', '.join(map(repr, value)) or 'none'}"[:200],
        )
    if absent := [column for name, column in fields if column not in value and name not in value]:
        found = f"columns {', '.join(map(repr, value)) or 'none'}"[:200]
        expected = f"a record with {', '.join(column for _, column in fields)}"
        raise DataError(f"no column {absent[0]!r}", kind="unknown-form", expected=expected, found=found)
    if record.get("functions") and data_format != "text":
        advice = 'Write them as \'tools\': [{"type": "function", "function": ...}]'
        raise DataError("'functions' would have no effect", kind="unknown-key", expected="'tools'", advice=advice)
    return _READERS[data_format](record)


def _refuse_records(items: list[Any]) -> None:
    """Raises DataError for a list of records in place of one record."""
    if items and all(isinstance(item, dict) and "role" not in item and _data_format_with(list(item)) for item in items):
        advice = "Write each record on a line of its own, or name the file .json"
        facts: dict[str, Any] = {"expected": "one record", "found": f"a list of {len(items)}", "advice": advice}
        raise DataError("several records in one", kind="over-lines", **facts)


def parse_cells(record: dict[str, Any], fields: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """A row of a table with lists in place of the JSON that its cells hold.

    Cells of `LIST_FIELDS` are lists. A prompt is a list of messages if it is the JSON of one. An answer is a list only
    if its prompt is one too: without that, an answer that is JSON is a text.

    Args:
        record: the row; it is left as it is.
        fields: see `read_record`.
    """
    column_of = {name: column for name, column in fields if column in record}
    row = dict(record)
    for name in LIST_FIELDS:
        column = column_of.get(name, name)
        if column in row:
            row[column] = _parsed(row[column])
    column = column_of.get("prompt", "prompt")
    if (prompt := _message_list(row.get(column))) is not None:
        row[column] = prompt
        for column in [column_of.get(name, name) for name in ANSWERS]:
            answer = _message_list(row.get(column))
            row |= {} if answer is None else {column: answer}
    return row


def _data_format_with(names: Sequence[str]) -> str | None:
    return next((data_format for data_format, keys in KEYS.items() if all(key in names for key in keys)), None)


def _message_list(value: object) -> list[Any] | None:
    """The messages in a cell; None if it holds something else."""
    if not isinstance(value, str) or not value.startswith("[{") or '"role"' not in value:
        return None
    found = _parsed(value)
    return found if isinstance(found, list) and all(isinstance(i, dict) and "role" in i for i in found) else None


def _data_format_of(record: Mapping[str, Any]) -> str:
    present = [key for key, value in record.items() if value is not None and value != []]
    if (data_format := _data_format_with(present)) is not None:
        return data_format
    if isinstance(_first(record), list):
        return "toolkit"
    if (data_format := _data_format_with(list(record))) is not None:
        return data_format  # whose reader says which of its fields is null
    raise DataError(
        "no messages: a record of no data format we know",
        kind="unknown-form",
        expected="messages, conversations, instruction and output, prompt and completion or response, or text",
        found=f"fields {', '.join(map(repr, record)) or 'none'}"[:200],
        advice="Name the fields with --field, such as --field prompt=question",
    )


def _toolkit(record: dict[str, Any]) -> Conversation:
    return Conversation(_first(record), _parsed(record.get("tools")), data_format="toolkit")


def _first(record: Mapping[str, Any]) -> Any:
    """The first value that is not null."""
    return next((value for value in record.values() if value is not None), None)


def _messages(record: dict[str, Any]) -> Conversation:
    return Conversation(_list(record["messages"], "messages"), _parsed(record.get("tools")), data_format="messages")


def _pair(answer: str, data_format: str) -> Callable[[dict[str, Any]], Conversation]:
    def read(record: dict[str, Any]) -> Conversation:
        messages = [
            *_system(record),
            *_turn("user", record["prompt"], "prompt"),
            *_turn("assistant", record[answer], answer),
        ]
        return Conversation(messages, _parsed(record.get("tools")), data_format=data_format)

    return read


def _instruction(record: dict[str, Any]) -> Conversation:
    texts = [_text(record["instruction"], "instruction"), _text(record.get("input") or "", "input")]
    messages = _system(record)
    history = _list(record.get("history"), "history") or ()
    if not isinstance(history, (list, tuple)) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("history has the wrong form", kind="wrong-field", expected="a list of [request, answer]")
    for request, answer in history:
        messages += [*_turn("user", request, "history"), *_turn("assistant", answer, "history")]
    messages += _turn("user", "\n\n".join(text for text in texts if text), "instruction")
    messages += _turn("assistant", record["output"], "output")
    return Conversation(messages, _parsed(record.get("tools")), data_format="instruction")


def _sharegpt(record: dict[str, Any]) -> Conversation:
    turns = _list(record["conversations"], "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("conversations has the wrong form", kind="no-messages", expected="a list of turns")
    messages = [*_system(record), *(_from_sharegpt(turn, index) for index, turn in enumerate(turns))]
    return Conversation(messages, _parsed(record.get("tools")), data_format="sharegpt")


def _from_sharegpt(turn: dict[str, Any], index: int) -> dict[str, Any]:
    """The turn as a message: two keys have other names, all others are kept and checked as those of messages are."""
    turn = {key: value for key, value in turn.items() if value is not None}
    for own, other in (("from", "role"), ("value", "content")):
        if own in turn and other in turn:
            what, advice = f"{own!r} and {other!r} in one turn", "Keep one of them"
            raise DataError(what, kind="unknown-key", where=f"message {index}", advice=advice)
    speaker, content = turn.pop("from", turn.pop("role", None)), turn.pop("value", turn.pop("content", None))
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        expected = f"one of {', '.join(SHAREGPT_ROLES)}"
        found = repr(speaker) if speaker is not None else "no 'from'"
        raise DataError("unknown role", kind="unknown-role", where=f"message {index}", expected=expected, found=found)
    if speaker != "function_call":
        return {"role": role, "content": content, **turn}
    if turn.get("tool_calls"):
        what, advice = "calls in 'tool_calls' and as the value of a function_call", "Keep one of them"
        raise DataError(what, kind="wrong-tool-call", where=f"message {index}", advice=advice)
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", **turn, "tool_calls": [{"function": call} for call in calls]}


def _plain_text(record: dict[str, Any]) -> Conversation:
    text = _text(record["text"], "text")
    if not text.strip():
        raise DataError("an empty text", kind="empty-answer", advice="Drop the record")
    return Conversation([], text=text, data_format="text")


_READERS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "toolkit": _toolkit,
    "messages": _messages,
    "prompt-completion": _pair("completion", "prompt-completion"),
    "prompt-response": _pair("response", "prompt-response"),
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}
DATA_FORMATS = tuple(_READERS)


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = record.get("system")
    return [{"role": "system", "content": _text(system, "system")}] if system else []


def _turn(role: str, value: Any, field: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": _text(value, field)}]


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} is not text", kind="wrong-field", expected="a string", found=_kind(value))
    return value


def _list(value: Any, field: str) -> Any:
    """A field that is a list; what else is wrong with it is seen later."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        advice = "Write the list itself; only a cell of a table holds it as text"
        facts: dict[str, Any] = {"expected": "a list", "found": "JSON text", "advice": advice}
        raise DataError(f"{field} has the wrong form", kind="wrong-field", **facts)
    return value


def _parsed(value: Any) -> Any:
    """The value of JSON text; text that is no JSON list or object stays as it is."""
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
