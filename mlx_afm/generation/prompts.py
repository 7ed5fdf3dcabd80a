"""Prompts of every form to ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from mlx_afm.errors import ConfigError
from mlx_afm.text.messages import parse_messages, parse_tools
from mlx_afm.text.system_prompt import parse_system_prompt, with_system_prompt
from mlx_afm.text.template import encode, render
from mlx_afm.text.tokenizer import AFMTokenizer, require_token_ids

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


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
    ids = encode(render(messages, system=None, tools=definitions, add_generation_prompt=True), tokenizer).ids
    return require_token_ids(ids, vocabulary, where=where)


def require_tokenizer(tokenizer: AFMTokenizer | None) -> AFMTokenizer:
    """The tokenizer, or ConfigError for a folder that has none."""
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", advice="Convert again with tokenizer.model in place.")
    return tokenizer
