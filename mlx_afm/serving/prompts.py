"""Prompts of requests to ids, as the model was trained to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_afm.errors import ConfigError, DataError
from mlx_afm.serving.fields import kind
from mlx_afm.text.messages import parse_messages, parse_tools
from mlx_afm.text.response_format import response_format
from mlx_afm.text.system_prompt import with_system_prompt
from mlx_afm.text.template import DEFAULT_SYSTEM, Turn, encode, render
from mlx_afm.text.tokenizer import AFMTokenizer, require_token_ids
from mlx_afm.text.weights import WEIGHT_KEYS

IDLE_KEYS = ("name", "refusal", "annotations", "audio", "function_call")  # of messages, as clients send them back
LEAST_PIECE_TOKENS = 64  # each piece of a prompt is a call of the model


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt.

    Attributes:
        ids: end where the answer begins.
        prefix_boundaries: lengths of its beginnings that other prompts may have too, ascending.
    """

    ids: list[int]
    prefix_boundaries: tuple[int, ...] = ()


def chat_prompt(
    messages: object,
    tools: Sequence[Any],
    schema: Mapping[str, Any] | None,
    tokenizer: AFMTokenizer,
    system: str | None = DEFAULT_SYSTEM,
) -> Prompt:
    """A conversation's prompt.

    Args:
        messages: OpenAI's, read by `parse_messages` as training data is.
        tools: definitions, written into the system message.
        schema: `json_schema` of the answer; written into the last message unless it has no name.
        tokenizer: the model's.
        system: system prompt if there is no system message; None for no system turn. Tools need a system turn, so
            with tools the model's own takes the place of None.

    Raises:
        DataError, ConfigError: it cannot be rendered.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("not a conversation", expected="a list of messages", found=kind(messages))
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    if schema is not None and schema.get("name") is not None and isinstance(plain[-1], dict):
        plain[-1] = {**plain[-1], "response_format": _asked_format(schema)}
    parsed = parse_messages(plain, where="messages", special_pieces=tokenizer.special_pieces)
    if parsed[-1].role not in ("user", "tool"):
        expected = "a user message or a tool's result last"
        raise DataError("nothing to answer", where="messages", expected=expected, found=f"role {parsed[-1].role!r}")
    definitions = parse_tools(list(tools), where="tools", special_pieces=tokenizer.special_pieces)
    parsed = with_system_prompt(parsed, DEFAULT_SYSTEM if definitions and system is None else system)
    encoded = encode(render(parsed, system=None, tools=definitions, add_generation_prompt=True), tokenizer)
    return Prompt(encoded.ids, boundaries_of(encoded.turns))


def boundaries_of(turns: Sequence[Turn]) -> tuple[int, ...]:
    """Lengths of a conversation's beginnings that others may share: behind its system message and before user and tool
    turns, but not too often.

    As a conversation grows its boundaries stay and others follow.
    """
    found = [turns[0].stop] if turns[0].role == "system" else []
    for turn in turns[1:]:
        if turn.role in ("user", "tool") and turn.start >= (found[-1] if found else 0) + LEAST_PIECE_TOKENS:
            found.append(turn.start)
    return tuple(found)


def text_prompts(prompt: object, tokenizer: AFMTokenizer, vocabulary: int, most: int) -> tuple[Prompt, ...]:
    """Prompts of text to be continued: a string, a list of ids, or a list of either.

    Raises:
        DataError: something else, or too many. ConfigError: an id outside the vocabulary.
    """
    several: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        several = prompt
    if len(several) > most:
        raise DataError("too many prompts in one request", expected=f"at most {most}", found=len(several))
    places = ["prompt"] if several == [prompt] else [f"prompt {number}" for number in range(len(several))]
    return tuple(Prompt(_text_ids(item, tokenizer, vocabulary, where)) for item, where in zip(several, places))


def _text_ids(prompt: object, tokenizer: AFMTokenizer, vocabulary: int, where: str) -> list[int]:
    if isinstance(prompt, str) and prompt:
        return [tokenizer.eos_id, *tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt and all(isinstance(item, (int, float)) for item in prompt):
        return require_token_ids(prompt, vocabulary, where=where)
    raise DataError(
        "not a prompt", where=where, expected=f"text, or token ids from 0 to {vocabulary - 1}", found=kind(prompt)
    )


def _plain(message: object, index: int) -> object:
    """A message without the keys that clients send back and that say nothing to the model."""
    if not isinstance(message, dict):
        return message
    where = f"messages, message {index}"
    if message.get("function_call") is not None or message.get("audio") is not None:
        raise DataError("function_call and audio are not supported", where=where)
    if given := [key for key in WEIGHT_KEYS if message.get(key) is not None]:
        raise DataError(f"{', '.join(given)}: loss weights have no effect here", where=where, advice="Remove them")
    return {key: value for key, value in message.items() if key not in IDLE_KEYS}


def _asked_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return response_format(schema["schema"], name=schema["name"], description=schema.get("description"))
    except ConfigError:  # not an object's: written as it came
        return {"type": "json_schema", "json_schema": {**schema, "strict": "true"}}
