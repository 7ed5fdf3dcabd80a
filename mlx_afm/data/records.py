"""Rows to examples: JSON, data format, transform and messages, each checked; the first fault is the row's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_afm.data.config import DataConfig
from mlx_afm.data.data_formats import Conversation, parse_cells, read_record
from mlx_afm.data.json_text import parse_json
from mlx_afm.data.rows import DataRow, not_utf8
from mlx_afm.errors import DataError, SettingError
from mlx_afm.files import to_json
from mlx_afm.text.messages import Message, parse_messages, parse_tools, refuse_special, require_trainable
from mlx_afm.text.template import (
    DEFAULT_SYSTEM,
    SPECIAL_TOKENS,
    Encoded,
    Span,
    encode,
    encode_text,
    render,
)
from mlx_afm.text.tokenizer import AFMTokenizer

Transform = Callable[[list[Any], int], list[Any]]


@dataclass(frozen=True)
class Example:
    """One conversation, or one plain text, to learn from.

    Attributes:
        messages: its turns, checked; the last is the assistant's. Empty for plain text.
        tools: tool definitions for the system turn.
        where: file and line.
        text: the plain text, if it is one.
        data_format: the form it was in.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    where: str
    text: str | None = None
    data_format: str = "toolkit"


class RecordReader:
    """Rows to examples, by the rules of a `DataConfig`."""

    def __init__(self, config: DataConfig, special_pieces: Sequence[str] = SPECIAL_TOKENS) -> None:
        """Finds the transform.

        Args:
            config: how to read.
            special_pieces: texts that no message may contain, from the tokenizer.

        Raises:
            ConfigError: there is no such transform.
        """
        self.config, self.special_pieces = config, tuple(special_pieces)
        self._transform = None if config.transform is None else find_transform(config.transform)

    def __call__(self, row: DataRow, index: int, where: str) -> Example:
        """The example in a row.

        Args:
            row: from `iter_rows`.
            index: its number in the split, counted from 0, for the transform.
            where: the example's file and line.

        Raises:
            DataError: with what is wrong; its place is the row, which the caller knows.
        """
        if row.fault is not None:
            raise row.fault
        value = _parse_row(row.text)
        conversation = read_record(value, self.config.data_format, self.config.fields, in_table=row.in_table)
        if conversation.text is not None:
            refuse_special(Message("user", conversation.text), self.special_pieces, None)
            return Example((), (), where, conversation.text, conversation.data_format)
        return self._checked(conversation, index, where)

    def _checked(self, conversation: Conversation, index: int, where: str) -> Example:
        value = conversation.messages
        if not isinstance(value, (list, tuple)):
            expected = 'a list of messages, or {"messages": [...]}'
            raise DataError("no messages", kind="no-messages", expected=expected, found=type(value).__name__)
        if self._transform is not None:
            value = _transformed(self._transform, list(value), index)
        messages = parse_messages(value, where=None, special_pieces=self.special_pieces)
        require_trainable(messages, None)
        tools = parse_tools(conversation.tools, where=None, special_pieces=self.special_pieces)
        return Example(messages, tools, where, None, conversation.data_format)


def as_json_line(row: DataRow, fields: Sequence[tuple[str, str]] = ()) -> bytes:
    """A row without a fault as a line of JSON: its own bytes, or of a row of a table its record with lists for JSON."""
    if not row.in_table:
        return row.text
    record = parse_json(row.text.decode("utf-8"))
    return to_json(parse_cells(record, fields)).encode("utf-8", "surrogatepass")


def find_transform(name: str) -> Transform:
    """The function `module:function`; modules of the current folder are found too.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        transform = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SettingError("no such transform", where=name, expected="module:function", found=error) from error
    if not callable(transform):
        raise SettingError("the transform is no function", where=name, found=type(transform).__name__)
    return transform  # type: ignore[no-any-return]


def transform_source(name: str) -> str | None:
    """The text of the module a transform is in, to tell whether it changed; None if there is none."""
    try:
        return inspect.getsource(sys.modules[find_transform(name).__module__])
    except (OSError, TypeError, KeyError):
        return None


def _transformed(transform: Transform, messages: list[Any], index: int) -> list[Any]:
    try:
        return transform(messages, index)
    except Exception as error:  # the user's function may raise anything; which record it was must be said
        found = f"{type(error).__name__}: {error}"
        raise DataError("the transform failed", kind="transform-failed", found=found) from error


def _parse_row(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from error
    if (nul := text.find("\0")) >= 0:
        advice = "The file is damaged, or of another encoding"
        raise DataError("a NUL byte", kind="nul", column=nul + 1, advice=advice)
    if text.startswith("\ufeff"):
        advice = "Files put together? Take it off"
        raise DataError("a byte order mark within the file", kind="byte-order-mark", column=1, advice=advice)
    return parse_json(text)


def render_example(example: Example, system: str | None = DEFAULT_SYSTEM) -> tuple[Span, ...]:
    """The spans of an example; plain text is one span."""
    if example.text is not None:
        return (Span(example.text, 1.0, "text"),)
    return render(example.messages, system=system, tools=example.tools)


def encode_spans(spans: Sequence[Span], tokenizer: AFMTokenizer) -> Encoded:
    """Ids of a rendered example and their loss weights: above 0 for assistant tokens and their `<turn_end>`."""
    if spans[0].role == "text":
        return encode_text(spans[0].text, tokenizer)
    return encode(spans, tokenizer)


def encode_example(example: Example, tokenizer: AFMTokenizer, system: str | None = DEFAULT_SYSTEM) -> Encoded:
    """Both at once."""
    return encode_spans(render_example(example, system), tokenizer)
