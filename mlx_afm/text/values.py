"""JSON values within messages: what may be written into a conversation, whatever its shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mlx_afm.errors import DataError

MAX_DEPTH = 64  # of nested JSON; schemas reach about twenty


def parse_arguments(arguments: object) -> object:
    """The value of a tool call's arguments: JSON text is parsed, anything else stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except RecursionError as error:
        raise DataError("arguments are nested too deeply", kind="nested-too-deeply") from error
    except ValueError:
        return arguments


def present(value: Any) -> Any:
    """An object without its null keys, which mean the same as absent ones; any other value as it is."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def require_json(value: object, name: str, where: object, *, kind: str | None = None) -> None:
    """Raises DataError, of the kind `wrong-NAME` unless another is given, for what is not JSON or nested too deeply."""
    if _depth(value) > MAX_DEPTH:
        expected = f"at most {MAX_DEPTH} levels"
        raise DataError(f"{name} is nested too deeply", kind="nested-too-deeply", where=where, expected=expected)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        what = f"{name} cannot be written as JSON: {error}"
        raise DataError(what, kind=kind or f"wrong-{name.replace('_', '-')}", where=where) from error


def _depth(value: object) -> int:
    """Levels of lists and dicts, counted no further than one too many."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list, tuple))]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def refuse_in(field: str, value: object, special_pieces: Sequence[str], where: object) -> None:
    """Raises DataError if any text in the value spells out one of the pieces, or cannot be written."""
    if not value:
        return
    pattern = _any_of(tuple(special_pieces)) if special_pieces else None
    for text in (value,) if isinstance(value, str) else _texts(value):
        _require_writable(text, field, where)
        if pattern is not None and (match := pattern.search(text)):
            raise DataError(
                f"{field} spells out the special token {match.group()!r}",
                kind="special-token",
                where=at(where, f"{field} column {match.start() + 1}"),
                advice="The model takes this text for the special token itself. Change the text",
            )


def is_good_text(text: str, special_pieces: Sequence[str]) -> bool:
    """Whether `refuse_in` would let it pass."""
    if "\0" in text or not (text.isascii() or _HALF.search(text) is None):
        return False
    return not special_pieces or _any_of(tuple(special_pieces)).search(text) is None


def _require_writable(text: str, field: str, where: object) -> None:
    """Raises DataError for what only an escape can bring into a text: NUL, or a lone surrogate."""
    if (nul := text.find("\0")) >= 0:
        place = at(where, f"{field} column {nul + 1}")
        raise DataError("a text holds a NUL character", kind="nul", where=place, advice="Remove it")
    if not text.isascii() and (half := _HALF.search(text)):
        place = at(where, f"{field} column {half.start() + 1}")
        advice = "An emoji was cut in two where the data was made; remove the half"
        raise DataError("not text: a lone surrogate", kind="half-surrogate", where=place, advice=advice)


_HALF = re.compile("[\ud800-\udfff]")


@lru_cache(maxsize=8)
def _any_of(pieces: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True)))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def at(where: object, place: str) -> str:
    """A place within another; `where` may be None, when the reader knows it."""
    return place if where is None else f"{where}, {place}"
