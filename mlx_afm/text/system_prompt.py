"""The system prompt: the text of the system turn of a conversation that has no system message.

One rule for training, generation, chat and serving:

    a text      the system turn has this text
    "" or None  there is no system turn
    not given   the one system prompt that the adapter was trained with; without an adapter, or if the adapter does
                not name exactly one, the model's own (`DEFAULT_SYSTEM`)

A system message in the conversation itself always wins. An adapter lists the system prompts of its training data
under `system_prompts` in `adapter_config.json`: a list of texts, the most frequent first, null for no system turn.
There the empty text is an empty system turn, which only a message in the data can ask for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.text.messages import Message
from mlx_afm.text.template import (
    DEFAULT_SYSTEM,
    SPECIAL_TOKENS,
    TurnEncoder,
    encode,
    render,
)

SYSTEM_PROMPTS = "system_prompts"  # key of `adapter_config.json`, and of the `config.json` of a fused model
MAX_RECORDED = 16  # distinct system prompts that an adapter lists
TOOLS = "\nsystem tools: "  # tool definitions follow it in a system turn

Ids = npt.NDArray[np.int32]
SystemPrompts = tuple[str | None, ...]


def system_fault(text: str | None) -> str | None:
    """What is wrong with a system prompt, in words; None if nothing is."""
    found = next((token for token in SPECIAL_TOKENS if token in (text or "")), None)
    return None if found is None else f"expected a text without special tokens, found {found}"


def parse_system_prompt(text: str) -> str | None:
    """The system prompt that a user's text means: None, no system turn, for "".

    Raises:
        SettingError: the text spells out a special token.
    """
    if (fault := system_fault(text)) is not None:
        raise SettingError(f"the system prompt cannot be used: {fault}")
    return text or None


def with_system_prompt(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Checked messages, with a system message in front if they have none; None adds nothing."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def default_system_prompt(trained_with: SystemPrompts) -> str | None:
    """The system prompt of an adapter's answers when none is given: the one it was trained with, if it is one."""
    return trained_with[0] if len(trained_with) == 1 else DEFAULT_SYSTEM


def system_prompt_notice(trained_with: SystemPrompts, where: object) -> str | None:
    """A warning for an adapter that was trained with several system prompts; None for any other."""
    if len(trained_with) < 2:
        return None
    count = f"at least {MAX_RECORDED}" if len(trained_with) >= MAX_RECORDED else len(trained_with)
    first = "no system turn" if trained_with[0] is None else repr(trained_with[0])
    return (
        f"{where}: the adapter was trained with {count} system prompts, so the model's own is used. "
        f"Choose one with --system-prompt; the most frequent one is {first}."
    )


def parse_system_prompts(value: Any) -> SystemPrompts:
    """The `system_prompts` of an adapter; empty if there are none.

    Raises:
        ConfigError: not a list of texts and nulls.
    """
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, type(None))) for item in value):
        expected, found = "a list of texts and nulls", f"{value!r:.80}"
        raise ConfigError("system_prompts has the wrong form", expected=expected, found=found)
    return tuple(value)


def trained_system_prompts(examples: Iterable[Sequence[int] | Ids], tokenizer: TurnEncoder) -> SystemPrompts:
    """The distinct system prompts of encoded conversations, the most frequent first, at most `MAX_RECORDED`.

    Tool definitions in a system turn are no part of the system prompt. Plain text has no system prompt.

    Args:
        examples: ids of each example, int32 (L,), as `encode` gives them.
        tokenizer: of these ids.
    Cost: one look at the first turn of each example; distinct turns are decoded once.
    """
    head = encode(render((Message("system", "x"),), system=None), tokenizer).ids
    head = head[: head.index(tokenizer.newline_id) + 1]
    counts: Counter[bytes | None] = Counter()
    for example in examples:
        ids = np.asarray(example, np.int32)
        if ids[: len(head)].tolist() == head:
            ends = np.flatnonzero(ids == tokenizer.turn_end_id)
            counts[ids[len(head) : ends[0] if len(ends) else None].tobytes()] += 1
        elif ids[1:2].tolist() == [tokenizer.turn_start_id]:
            counts[None] += 1
    texts: Counter[str | None] = Counter()
    for turn, count in counts.items():
        text = None if turn is None else tokenizer.decode(np.frombuffer(turn, np.int32).tolist())
        texts[None if text is None else text.partition(TOOLS)[0]] += count
    return tuple(text for text, _ in texts.most_common(MAX_RECORDED))
