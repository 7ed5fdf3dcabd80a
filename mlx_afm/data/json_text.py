"""JSON as training data must be: shallow, each key once, and nothing that other readers refuse."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from mlx_afm.errors import DataError
from mlx_afm.text.values import MAX_DEPTH

# A string without its end reaches to the end of the text, so no place is looked at twice.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: not JSON, nested more than `MAX_DEPTH` levels deep, or an object with a key twice.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise DataError("JSON nested too deeply", kind="nested-too-deeply", expected=f"at most {MAX_DEPTH} levels")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", kind="bad-json", column=error.colno) from error
    except DataError:
        raise
    except ValueError as error:  # what Python refuses to convert
        raise DataError("not JSON: a number of thousands of digits", kind="bad-json") from error


def _depth(text: str) -> int:
    """Levels of brackets outside of strings."""
    deepest = depth = 0
    for token in _BRACKETS.finditer(text):
        if token.group() in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token.group() in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        advice = "Only the last would count; keep one"
        raise DataError(f"the key {twice!r} stands twice in an object", kind="duplicate-key", advice=advice)
    return value


def _no_constant(name: str) -> Any:
    raise DataError(f"not JSON: {name} is no number", kind="bad-json", advice="Write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
