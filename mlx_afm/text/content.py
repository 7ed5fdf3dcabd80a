"""What the `content` of a message means: one meaning for training data, files of prompts and the server.

| `content` | role | becomes |
|---|---|---|
| a string | any | that text |
| a list of parts, `{"type": "text", "text": ...}` each | any | the texts of the parts, joined |
| an object | tool | a result: its JSON |
| a list of tool definitions | tool | definitions of new tools |
| any other list | tool | a result: its JSON |
"""

from __future__ import annotations

from typing import Any

from mlx_afm.errors import DataError
from mlx_afm.files import to_json
from mlx_afm.text.values import require_json

Content = str | dict[str, Any] | list[Any]

# Types of content parts, in the OpenAI API and in programs that follow it.
PART_TYPES = ("text", "image_url", "image", "input_audio", "audio", "file", "video", "refusal")


def parse_content(content: object, role: str, where: object) -> Content:
    """The content of a message by the table above.

    Args:
        content: what the JSON holds.
        role: `system`, `user`, `assistant` or `tool`.
        where: named in errors.

    Returns:
        A text; for the role `tool` also a result (dict) or definitions of new tools (list).

    Raises:
        DataError: of another form, or a part that is not text.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and (role != "tool" or any(map(_is_part, content))):
        return "".join(_part_text(part, where) for part in content)
    if role != "tool":
        expected = 'a string, or a list of {"type": "text", "text": ...}'
        found = "an empty list" if content == [] else kind_of(content)
        raise DataError("content is not text", kind="wrong-content", where=where, expected=expected, found=found)
    if not isinstance(content, (dict, list)):
        expected = "a string, a result (an object or a list) or a list of tool definitions"
        facts: dict[str, Any] = {"expected": expected, "found": kind_of(content)}
        raise DataError("a tool's content cannot be used", kind="wrong-content", where=where, **facts)
    require_json(content, "content", where)
    if isinstance(content, list) and not (content and all(map(is_tool_definition, content))):
        return to_json(content)
    return content


def is_tool_definition(value: object) -> bool:
    """Whether a value defines a tool: `{"type": "function", "function": {"name", ...}}`, or a name with parameters."""
    if not isinstance(value, dict):
        return False
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" in function:
        return False
    return "function" in value or any(isinstance(value.get(key), dict) for key in ("parameters", "input_schema"))


def join_results(first: Content, second: Content) -> str | None:
    """Two results in a row as one text, a line each; None if one of them defines new tools."""
    if isinstance(first, list) or isinstance(second, list):
        return None
    return "\n".join(result if isinstance(result, str) else to_json(result) for result in (first, second))


def kind_of(value: object) -> str:
    """The type of a value, as errors name it."""
    return "null" if value is None else type(value).__name__


def _is_part(item: object) -> bool:
    """Whether an item is a content part: its type names the key with its value."""
    if not isinstance(item, dict) or item.get("type") not in PART_TYPES:
        return False
    return item["type"] in item or "source" in item


def _part_text(part: object, where: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        named = isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text"
        raise DataError(
            "a part of the content is not text",
            kind="wrong-content",
            where=where,
            expected='{"type": "text", "text": ...}',
            found=f"type {part['type'][:40]!r}" if named else kind_of(part),  # type: ignore[index]
            advice="The model reads text only",
        )
    return text
