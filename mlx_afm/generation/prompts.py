"""Prompts of every form to ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_afm.errors import ConfigError
from mlx_afm.text.messages import parse_messages, parse_tools
from mlx_afm.text.system_prompt import parse_system_prompt, with_system_prompt
from mlx_afm.text.template import encode, render
from mlx_afm.text.tokenizer import AFMTokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


def to_prompt_ids(
    tokenizer: AFMTokenizer,
    prompt: Prompt,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
) -> list[int]:
    """Ids that end where the answer begins.

    Args:
        tokenizer: the model's.
        prompt: a user's text, a list of message dicts, or ids, which are taken as they are.
        tools: tool definitions for the system turn.
        system: system prompt of messages without a system message; "" for no system turn, None for the
            tokenizer's `system_prompt`.

    Raises:
        DataError: messages that the template cannot render. ConfigError: an empty prompt.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise ConfigError("an empty prompt")
    if all(isinstance(item, int) for item in prompt):
        return [int(item) for item in prompt]  # type: ignore[arg-type]
    messages = parse_messages(list(prompt), where="prompt", special_pieces=tokenizer.special_pieces)
    messages = with_system_prompt(messages, tokenizer.system_prompt if system is None else parse_system_prompt(system))
    definitions = parse_tools(tools or (), where="tools", special_pieces=tokenizer.special_pieces)
    return encode(render(messages, system=None, tools=definitions, add_generation_prompt=True), tokenizer).ids


def require_tokenizer(tokenizer: AFMTokenizer | None) -> AFMTokenizer:
    """The tokenizer, or ConfigError for a folder that has none."""
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", advice="Convert again with tokenizer.model in place.")
    return tokenizer
