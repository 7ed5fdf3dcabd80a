"""`examples.generate` of Apple's toolkit: answers to a prompt, or to each conversation of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_afm.errors import DataError, FormatError
from mlx_afm.files import to_optional_path, to_path
from mlx_afm.generation import GenerateConfig, generate
from mlx_afm.workflows.load import load

Conversation = str | list[Mapping[str, Any]]


def conversations_of(prompt: str) -> list[Conversation]:
    """What to answer: the prompt itself, or the conversations of the `.jsonl` that it names; see `read_prompts`."""
    return read_prompts(prompt) if prompt.endswith(".jsonl") else [prompt]


def answers(
    model: str | Path,
    conversations: Sequence[Conversation],
    config: GenerateConfig,
    *,
    checkpoint: str | Path | None = None,
) -> Iterator[tuple[int, str]]:
    """The number of each conversation, from 0, and its answer.

    Args:
        model: MLX model folder.
        conversations: see `conversations_of`.
        config: how to answer.
        checkpoint: an adapter of any form; None for the base model.

    Raises:
        DataError: messages that the template cannot render. AdapterError: an adapter for another model.
    """
    checkpoint = to_optional_path(checkpoint)
    loaded, tokenizer = load(model, checkpoint)
    for number, conversation in enumerate(conversations):
        yield number, generate(loaded, tokenizer, conversation, config)


def read_prompts(path: str | Path) -> list[Conversation]:
    """The conversations in a file, one a line: a list of messages, or an object whose first value is that list.

    Raises:
        DataError: a line of another form, or one that does not end with the user; all of them.
        FormatError: no such file, or not UTF-8.
    """
    path = to_path(path)
    if not path.is_file():
        raise FormatError("no such file", where=path, expected="conversations, one a line")
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8 text", where=f"{path}, byte {error.start}") from error
    found: list[Conversation] = []
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_messages(line))
        except (ValueError, RecursionError) as error:
            faults.append(DataError(f"{error!s:.200}", where=f"{path} line {number}"))
    if not found and not faults:
        faults.append(DataError("no conversation", where=path))
    if len(faults) > 1:
        raise DataError(
            "lines that are no conversations", where=path, faults=faults, details=list(map(str, faults[:20]))
        )
    if faults:
        raise faults[0]
    return found


def _messages(line: str) -> list[Mapping[str, Any]]:
    value = json.loads(line)
    if isinstance(value, dict) and value:
        value = next(iter(value.values()))
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value) or not value:
        raise ValueError("expected a list of messages")
    if value[-1].get("role") == "assistant":
        raise ValueError("expected a conversation that ends with the user, found one that is answered")
    return value
