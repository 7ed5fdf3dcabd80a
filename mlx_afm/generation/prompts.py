"""Prompts of every form to ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from mlx_afm.errors import ConfigError, DataError
from mlx_afm.text.messages import Message, parse_messages, parse_tools
from mlx_afm.text.system_prompt import parse_system_prompt, with_system_prompt
from mlx_afm.text.template import DEFAULT_SYSTEM, Encoded, Turn, encode, render
from mlx_afm.text.tokenizer import AFMTokenizer, require_token_ids

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
LEAST_PIECE_TOKENS = 64  # each piece of a prompt is a call of the model


@dataclass(frozen=True)
class EncodedPrompt:
    """Ids of a prompt.

    Attributes:
        ids: end where the answer begins.
        prefix_boundaries: lengths of its prefixes that other prompts may have too, ascending.
        text: that it was made of, if it was one text.
    """

    ids: list[int]
    prefix_boundaries: tuple[int, ...] = ()
    text: str | None = None


def to_prompt_ids(
    tokenizer: AFMTokenizer,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    vocabulary: int | None = None,
    where: str = "prompt",
) -> list[int]:
    """Ids that end where the answer begins.

    Args:
        tokenizer: the model's.
        prompt: a user's text, a list of message dicts, or ids (a list, or an array (L,)), which are taken as they are.
        tools: tool definitions for the system turn.
        system: system prompt of messages without a system message; "" for no system turn, None for the
            tokenizer's `system_prompt`.
        vocabulary: rows of the model's embedding, the bound of ids; by default the tokenizer's pieces.
        where: named in errors.

    Raises:
        DataError: messages that the template cannot render. ConfigError: an empty prompt, or an id that the model
            does not have.
    """
    vocabulary = tokenizer.vocab_size if vocabulary is None else vocabulary
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise ConfigError("an empty prompt", where=None if where == "prompt" else where)
    if all(isinstance(item, Number) for item in prompt):
        return require_token_ids(prompt, vocabulary, where=where)
    messages = parse_messages(list(prompt), where=where, special_pieces=tokenizer.special_pieces)
    messages = with_system_prompt(messages, tokenizer.system_prompt if system is None else parse_system_prompt(system))
    definitions = parse_tools(tools or (), where="tools", special_pieces=tokenizer.special_pieces)
    ids = _encode(tokenizer, messages, definitions).ids
    return require_token_ids(ids, vocabulary, where=where)


def encode_conversation(
    tokenizer: AFMTokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    system: str | None = DEFAULT_SYSTEM,
    joins_turns: bool = False,
) -> EncodedPrompt:
    """The prompt of a conversation that others may continue.

    Args:
        tokenizer: the model's.
        messages: dicts, read by `parse_messages` as training data is.
        tools: definitions for the system turn.
        system: system prompt of messages without a system message; None for no system turn. Tools need a system turn,
            so with tools the model's own takes the place of None.
        joins_turns: see `parse_messages`.

    Raises:
        DataError, ConfigError: the template cannot render it, or there is nothing to answer.
    """
    parsed = parse_messages(
        messages, where="messages", special_pieces=tokenizer.special_pieces, joins_turns=joins_turns
    )
    if parsed[-1].role not in ("user", "tool"):
        expected = "a user message or a tool's result last"
        raise DataError("nothing to answer", where="messages", expected=expected, found=f"role {parsed[-1].role!r}")
    definitions = parse_tools(tools, where="tools", special_pieces=tokenizer.special_pieces)
    parsed = with_system_prompt(parsed, DEFAULT_SYSTEM if definitions and system is None else system)
    encoded = _encode(tokenizer, parsed, definitions)
    return EncodedPrompt(encoded.ids, prefix_boundaries(encoded.turns))


def _encode(tokenizer: AFMTokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Encoded:
    """Checked messages as a prompt; the system prompt is among them."""
    return encode(render(messages, system=None, tools=tools, add_generation_prompt=True), tokenizer)


def prefix_boundaries(turns: Sequence[Turn]) -> tuple[int, ...]:
    """Lengths of a conversation's prefixes that others may share: behind its system message and before user and tool
    turns, at least `LEAST_PIECE_TOKENS` apart.

    As a conversation grows its boundaries stay and others follow.
    """
    found = [turns[0].stop] if turns[0].role == "system" else []
    for turn in turns[1:]:
        if turn.role in ("user", "tool") and turn.start >= (found[-1] if found else 0) + LEAST_PIECE_TOKENS:
            found.append(turn.start)
    return tuple(found)


def require_tokenizer(tokenizer: AFMTokenizer | None) -> AFMTokenizer:
    """The tokenizer, or ConfigError for a folder that has none."""
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", advice="Convert again with tokenizer.model in place.")
    return tokenizer
