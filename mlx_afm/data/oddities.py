"""What is odd about a good example: training takes it, and `data check` warns of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from mlx_afm.data.records import Example
from mlx_afm.data.report import Problem
from mlx_afm.data.rows import DataRow
from mlx_afm.text.template import NEWLINE
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.values import parse_arguments

# Special tokens and headings of the chat templates of other models; this model reads them as ordinary text.
OTHER_TEMPLATES = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<|message|>", "<|channel|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("<start_of_turn>", "<end_of_turn>", "<|begin▁of▁sentence|>", "<|end▁of▁sentence|>"),
    *("### Instruction:", "### Response:", "### Human:", "### Assistant:"),
)
_OTHER = re.compile("|".join(map(re.escape, OTHER_TEMPLATES)))
_NEWLINE, _REPLACEMENT = NEWLINE.encode(), "\ufffd".encode()
SHOWN = 3  # different texts that a warning names


def iter_oddities(example: Example, text: str, row: DataRow, file: str) -> Iterator[Problem]:
    """The warnings that the texts of an example deserve.

    Args:
        example: a good one.
        text: the example, rendered.
        row: where it comes from.
        file: named in the warnings.
    """
    if _NEWLINE in row.text:
        message = f"a text spells {NEWLINE!r}, which the model reads as a newline"
        yield Problem(file, row.line, "newline-mark", message, _column(row.text, NEWLINE))
    if _REPLACEMENT in row.text or (b"\\u" in row.text and b"\\ufffd" in row.text.lower()):
        message = "a text holds the replacement character U+FFFD: something was lost where the data was made"
        yield Problem(file, row.line, "replacement-character", message, _column(row.text, "\ufffd"))
    if found := Counter(_OTHER.findall(text)):
        message = (
            f"special tokens of another model's chat template: {_counted(found)}. This model reads them as ordinary "
            "text. Remove them: the roles of the messages are enough"
        )
        yield Problem(file, row.line, "other-template", message, _column(row.text, next(iter(found))))
    for index, message_ in enumerate(example.messages):
        if message_.role == "user" and not str(message_.content).strip():
            yield Problem(file, row.line, "empty-prompt", f"message {index}: an empty request")
        for call in message_.tool_calls or ():
            if not isinstance(arguments := parse_arguments(call["function"]["arguments"]), dict):
                message = (
                    f"message {index}: the arguments of {call['function']['name'][:40]!r} are not a JSON object "
                    f"(found {arguments!r:.60}). The model learns to call tools so"
                )
                yield Problem(file, row.line, "arguments-not-json", message)


def unknown_tokens(text: str, tokenizer: AFMTokenizer, row: DataRow, file: str) -> Problem:
    """The warning about an example with characters that become the unknown token."""
    found = Counter("".join(tokenizer.unknown_texts(text)))
    message = (
        f"the tokenizer has no piece for {_counted(found)}: the model reads <unk> there, "
        "and it can never write these characters"
    )
    return Problem(file, row.line, "unknown-token", message)


def _counted(found: Counter[str]) -> str:
    shown = ", ".join(f"{text!r} ({count})" for text, count in found.most_common(SHOWN))
    return f"{shown} and {len(found) - SHOWN} more" if len(found) > SHOWN else shown


def _column(text: bytes, piece: str) -> int | None:
    place = text.decode("utf-8").find(piece)
    return None if place < 0 else place + 1
