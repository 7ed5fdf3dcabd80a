"""What an answer is to follow, from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_afm.errors import ConfigError
from mlx_afm.files import read_json, to_path
from mlx_afm.generation.schema import FORMS, parse_wanted
from mlx_afm.text.response_format import response_format


class ResponseFormat(NamedTuple):
    """What an answer is to follow.

    Attributes:
        guide: for `guided_processor`.
        message: the `response_format` of the question, by which the model reads the schema; None if there is none.
    """

    guide: dict[str, Any]
    message: dict[str, Any] | None


def read_response_format(path: str | Path) -> ResponseFormat:
    """What a JSON file asks for: a schema of an object, named by its title or else the file's, or a response format.

    Raises:
        FormatError: no JSON file. ConfigError: neither of both.
    """
    path = to_path(path)
    value = read_json(path)
    if not isinstance(value, Mapping):
        expected = "a JSON schema of an object, or a response format"
        raise ConfigError("not a response format", where=path, expected=expected, found=type(value).__name__)
    if value.get("type") in FORMS:
        parse_wanted(value)
        return ResponseFormat(dict(value), dict(value) if value["type"] == "json_schema" else None)
    wrapped = response_format(value, name=None if value.get("title") else path.stem)
    return ResponseFormat(wrapped, wrapped)
