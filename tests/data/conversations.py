"""Conversations of every sort, and what training sees of them, for the tests of data formats."""

import json

from mlx_afm.data.config import DataConfig
from mlx_afm.data.records import RecordReader, render_example
from mlx_afm.data.rows import DataRow

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ANSWER = {"role": "user", "content": "two\nlines"}, {"role": "assistant", "content": "naïve 東京 🎉"}
MORE, LAST = {"role": "user", "content": "and?"}, {"role": "assistant", "content": 'that "is" all,\tdone'}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "N", "schema": {"type": "object"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"a": 1}'}}]}
RESULT = {"role": "tool", "content": "found"}

# name -> (messages, tools, text)
CONVERSATIONS = {
    "pair": ([USER, ANSWER], [], None),
    "system": ([SYSTEM, USER, ANSWER], [], None),
    "turns": ([SYSTEM, USER, ANSWER, MORE, LAST, USER, LAST], [], None),
    "tools": ([SYSTEM, USER, CALL, RESULT, ANSWER], TOOLS, None),
    "own-tools": ([{**SYSTEM, "tools": TOOLS}, USER, ANSWER], [], None),
    "format": ([{**USER, "response_format": FORMAT}, ANSWER], [], None),
    "system-format": ([{**SYSTEM, "response_format": FORMAT}, USER, ANSWER], [], None),
    "words-and-call": ([USER, {**CALL, "content": "one moment"}, RESULT, LAST], [], None),
    "dict-result": ([USER, CALL, {"role": "tool", "content": {"r": 1}}, LAST], [], None),
    "ends-in-a-call": ([USER, ANSWER, MORE, CALL], TOOLS, None),
    "empty-system": ([{"role": "system", "content": ""}, USER, ANSWER], [], None),
    "like-messages": ([{"role": "user", "content": '[{"role": "user", "content": "x"}]'}, ANSWER], [], None),
    "like-json": ([{"role": "user", "content": '[{"a": 1}]'}, {**ANSWER, "content": '{"b": [2]}'}], [], None),
    "weights": ([USER, {**ANSWER, "weight": 0}, MORE, {**LAST, "weight": 0.5}], [], None),
    "weighted-call": ([USER, {**CALL, "weight": 0}, RESULT, RESULT, LAST], TOOLS, None),
    "greeting": ([SYSTEM, ANSWER, USER, LAST], [], None),
    "text": ([], [], "plain\ntext"),
}  # fmt: skip


def read(record, data_format="auto"):
    """The example of a record."""
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return RecordReader(DataConfig(data_format=data_format))(DataRow(1, raw), 0, "x")


def seen(example):
    """What training sees of it."""
    return render_example(example)


def seen_of(name):
    """What training sees of a conversation above."""
    messages, tools, text = CONVERSATIONS[name]
    return seen(read({"text": text} if text else {"messages": messages, "tools": tools}))
