"""Examples to tokens, through the chat template, which alone knows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_afm.data.records import Example
from mlx_afm.text.template import DEFAULT_SYSTEM, Encoded, Span, encode, encode_text, render
from mlx_afm.text.tokenizer import AFMTokenizer


def render_example(example: Example, system: str | None = DEFAULT_SYSTEM) -> tuple[Span, ...]:
    """The spans of an example; plain text is one span."""
    if example.text is not None:
        return (Span(example.text, 1.0, "text"),)
    return render(example.messages, system=system, tools=example.tools)


def encode_spans(spans: Sequence[Span], tokenizer: AFMTokenizer) -> Encoded:
    """Ids of a rendered example and their loss weights: above 0 for assistant tokens and their `<turn_end>`."""
    if spans[0].role == "text":
        return encode_text(spans[0].text, tokenizer)
    return encode(spans, tokenizer)


def encode_example(example: Example, tokenizer: AFMTokenizer, system: str | None = DEFAULT_SYSTEM) -> Encoded:
    """Both at once."""
    return encode_spans(render_example(example, system), tokenizer)
