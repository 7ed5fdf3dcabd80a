"""Tool calls in an answer: read out of its text, whole or while it arrives.

    I'll look. <executable_start> ```function
    [{"name": "weather", "arguments": {"city": "Paris"}}]```<executable_end>

The rules, which hold however the text is cut into pieces:

  - a block goes from a start token to the first end token after it; of two start tokens in a row the later counts;
  - its fence holds JSON: a list of calls that is not empty, or one call. A call has a `name` and may have `arguments`;
  - a block that the end of the answer cuts off counts for its finished calls; what is left of it is dropped;
  - a block that breaks a rule, or is cut off before its first call is finished, is text and stays in the content
    with its special tokens (`ToolCallTokenFilter` removes them from a text that must not contain any);
  - the content is the text without the blocks, every character kept.

Shape of a call: OpenAI's, with `arguments` as JSON text. Rendered by the template and read again, calls are the same.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from mlx_afm.text.template import EXECUTABLE_END, EXECUTABLE_START

FENCE = "```"
TOOL_CALL_TOKENS = (EXECUTABLE_START, EXECUTABLE_END)
_BLOCK_HEAD = f"{FENCE}function["  # with spaces and newlines between


class Parsed(NamedTuple):
    """What an answer, or the next piece of it, says and calls.

    Attributes:
        content: text outside the blocks.
        calls: `{"id", "type": "function", "function": {"name", "arguments"}}` each.
    """

    content: str
    calls: list[dict[str, Any]]


def parse_tool_calls(text: str) -> Parsed:
    """The content and the calls of a whole answer; nothing that it says is an error."""
    parser = ToolCallParser()
    first, last = parser.feed(text), parser.finish()
    return Parsed(first.content + last.content, first.calls + last.calls)


class ToolCallParser:
    """The same for an answer that arrives in pieces, special tokens split anywhere.

        parser.feed("Let me see. <execu")             "Let me see. "  no calls
        parser.feed('table_start> ```function\\n[{')   ""              no calls
        parser.feed('"name": "now"}]```<executable_end>')   ""         now()
        parser.finish()                               ""              no calls

    Only what could still be part of a special token or a block is held back. Calls appear when their block ends.

    Args:
        new_id: gives each call its id; random ones by default.
    """

    def __init__(self, new_id: Callable[[], str] | None = None) -> None:
        self._new_id = new_id or _random_id
        self._held = ""  # not told yet: from a start token on, or what may become one
        self._searched = 0  # in `_held` no special token but the one at its start begins before this place
        self._inside = False

    def feed(self, piece: str) -> Parsed:
        """What became certain with this piece."""
        self._held += piece
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        while self._advance(content, calls):
            pass
        return Parsed("".join(content), calls)

    def finish(self) -> Parsed:
        """The rest: the finished calls of a block that did not end, or text."""
        rest, inside = self._held, self._inside
        self._held, self._inside, self._searched = "", False, 0
        found = _finished_calls(rest[len(EXECUTABLE_START) :]) if inside else []
        return Parsed("", self._with_ids(found)) if found else Parsed(rest, [])

    def _with_ids(self, functions: list[dict[str, str]]) -> list[dict[str, Any]]:
        return [{"id": self._new_id(), "type": "function", "function": function} for function in functions]

    def _advance(self, content: list[str], calls: list[dict[str, Any]]) -> bool:
        """One step, outside or inside a block; False when more text is needed."""
        if not self._inside:
            start = self._held.find(EXECUTABLE_START)
            self._inside = start >= 0
            keep = start if self._inside else len(self._held) - _overlap(self._held, EXECUTABLE_START)
            content.append(self._held[:keep])
            self._held, self._searched = self._held[keep:], len(EXECUTABLE_START)
            return self._inside
        end = self._held.find(EXECUTABLE_END, self._searched)
        again = self._held.rfind(EXECUTABLE_START, self._searched, end if end >= 0 else len(self._held))
        if again > 0:
            content.append(self._held[:again])
            self._held, self._searched = self._held[again:], len(EXECUTABLE_START)
            return True
        if end < 0:
            self._searched = max(self._searched, len(self._held) - len(EXECUTABLE_START) + 1)
            return False
        found = _parse_block(self._held[len(EXECUTABLE_START) : end])
        end += len(EXECUTABLE_END)
        if found is None:
            content.append(self._held[:end])
        else:
            calls += self._with_ids(found)
        self._held, self._inside = self._held[end:], False
        return True


class ToolCallTokenFilter:
    """Removes the special tokens of tool calls from a text that arrives in pieces.

        push("a <executable_start> b <exec")     "a  b "
        push("ution")                            "<execution"

    Only what could still become a special token is held back, also what stands around one that was removed.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """What became certain with this piece."""
        text = self._held + piece
        while any(token in text for token in TOOL_CALL_TOKENS):
            for token in TOOL_CALL_TOKENS:
                text = text.replace(token, "")
        certain = len(text)
        while size := max(_overlap(text[:certain], token) for token in TOOL_CALL_TOKENS):
            certain -= size
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The rest."""
        rest, self._held = self._held, ""
        return rest


def is_open_block(text: str) -> bool:
    """Whether a text is the beginning of a block of calls, of any length, that does not end."""
    if not text.startswith(EXECUTABLE_START) or EXECUTABLE_END in text:
        return False
    begun = "".join(text[len(EXECUTABLE_START) :][:100].split())
    return begun.startswith(_BLOCK_HEAD) or _BLOCK_HEAD.startswith(begun)


def _random_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _overlap(text: str, token: str) -> int:
    """How many characters at the end of the text may begin the token."""
    return next((size for size in range(min(len(text), len(token) - 1), 0, -1) if token.startswith(text[-size:])), 0)


def _parse_block(text: str) -> list[dict[str, str]] | None:
    """The functions called in the text between the special tokens, or None if it is no block."""
    text = text.strip()
    if len(text) < 2 * len(FENCE) or not (text.startswith(FENCE) and text.endswith(FENCE)):
        return None
    inner = text[len(FENCE) : -len(FENCE)].lstrip().removeprefix("function")
    try:
        value = json.loads(inner, parse_constant=_refuse)
        items = value if isinstance(value, list) else [value]
        functions = [_function(item) for item in items]
    except (ValueError, RecursionError):  # ValueError: also a lone surrogate, which is no text
        return None
    return functions or None


def _finished_calls(text: str) -> list[dict[str, str]]:
    """The functions whose calls are whole in the text of a block that was cut off."""
    text = text.strip()
    if not text.startswith(FENCE):
        return []
    rest = text.removeprefix(FENCE).lstrip().removeprefix("function").lstrip().removeprefix("[").lstrip()
    decoder, functions = json.JSONDecoder(parse_constant=_refuse), list[dict[str, str]]()
    with suppress(ValueError, RecursionError):  # the call that was cut off
        while rest.startswith("{"):
            item, end = decoder.raw_decode(rest)
            functions.append(_function(item))
            rest = rest[end:].lstrip()
            rest = rest[1:].lstrip() if rest.startswith(",") else ""
    return functions


def _function(item: object) -> dict[str, str]:
    if not isinstance(item, dict) or not {"name"} <= set(item) <= {"name", "arguments"}:
        raise ValueError("not a call")
    name, arguments = item["name"], item.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    written = _arguments_text(arguments)
    f"{name}{written}".encode()
    return {"name": name, "arguments": written}


def _arguments_text(arguments: object) -> str:
    """JSON text that the template turns into these arguments again.

    It writes a text that is no JSON as it is, so such a text is kept; one that happens to be JSON is quoted.
    """
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
