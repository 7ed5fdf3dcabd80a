"""JSON lines to examples: every line is checked before the first one is used.

Two forms of a line are read: the toolkit's (a list of messages, or an object whose first value is
one) and mlx-lm's (`{"messages": [...]}`, optionally with `"tools"`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_afm.errors import DataError, FormatError
from mlx_afm.text.messages import Message, parse_messages, parse_tools, require_trainable
from mlx_afm.tree import shorten


@dataclass(frozen=True)
class Example:
    """One conversation to learn from.

    Attributes:
        messages: its turns, checked; the last is the assistant's.
        tools: tool definitions for the system turn.
        where: file and line.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    where: str


def read_examples(path: Path, special_pieces: Sequence[str]) -> list[Example]:
    """All examples of a JSONL file; blank lines are skipped.

    Args:
        path: a UTF-8 file.
        special_pieces: texts that no message may contain, from the tokenizer.

    Raises:
        FormatError: no such file, or not UTF-8.
        DataError: no example at all, or faulty lines: all of them, each with its line number.
    """
    if not path.is_file():
        raise FormatError("no such file", where=path, expected="training data, one JSON value a line")
    examples, faults = [], []
    for number, line in _lines(path):
        try:
            examples.append(parse_line(line, special_pieces, where=f"{path.name} line {number}"))
        except DataError as error:
            faults.append(str(error))
    if faults:
        advice = "Nothing was trained; correct the lines and start again."
        raise DataError(f"{len(faults)} faulty line(s)", where=path, advice=advice, details=shorten(faults))
    if not examples:
        raise DataError("no examples", where=path, expected="at least one line")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{path} line {number}, byte {error.start + 1}"
                raise FormatError("not UTF-8 text", where=where, advice="Save the file as UTF-8.") from error
            if line.strip():
                yield number, line.rstrip("\r\n")  # with it, a fault at the end would be at column 1


def parse_line(line: str, special_pieces: Sequence[str], *, where: str) -> Example:
    """The example in one line.

    Raises:
        DataError: with what is wrong and where.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", where=f"{where}, column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not JSON: {error}", where=where) from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply", where=where) from error
    tools: Any = []
    if isinstance(value, dict):
        tools = value.get("tools") or []
        value = value["messages"] if "messages" in value else next(iter(value.values()), None)
    if not isinstance(value, list):
        expected = 'a list of messages, or {"messages": [...]}'
        raise DataError("no messages", where=where, expected=expected, found=type(value).__name__)
    messages = parse_messages(value, where=where, special_pieces=special_pieces)
    require_trainable(messages, where)
    return Example(messages, parse_tools(tools, where=where, special_pieces=special_pieces), where)
