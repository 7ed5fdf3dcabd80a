"""Examples to tokens, through the chat template, which alone knows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_afm.data.records import Example
from mlx_afm.data.tokens import Tokens
from mlx_afm.errors import DataError
from mlx_afm.text.template import encode, render
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.tree import shorten

CONTEXT_TOKENS = 4096  # the model's context


def encode_example(example: Example, tokenizer: AFMTokenizer) -> Tokens:
    """Ids and weights of one example: weight 1 on every assistant token and its `<turn_end>`."""
    encoded = encode(render(example.messages, tools=example.tools), tokenizer)
    ids, trained = np.array(encoded.ids, np.int32), np.array(encoded.trained, np.float32)
    return Tokens(ids, trained, example.where)


def encode_examples(
    examples: Sequence[Example], tokenizer: AFMTokenizer, max_tokens: int = CONTEXT_TOKENS
) -> list[Tokens]:
    """All examples encoded.

    Raises:
        DataError: examples that hold no proper text, or longer than `max_tokens`; all of them, the long
            ones with their lengths, since cutting them would cut answers.
    """
    encoded, faults = [], []
    for example in examples:
        try:
            encoded.append(encode_example(example, tokenizer))
        except DataError as error:
            faults.append(f"{example.where}: {error}")
    if faults:
        raise DataError(f"{len(faults)} example(s) that cannot be encoded", details=shorten(faults))
    long = [f"{tokens.where}: {len(tokens)} tokens" for tokens in encoded if len(tokens) > max_tokens]
    if long:
        advice = "Shorten or remove these lines, or raise --max-seq-length (the model's context is 4096)."
        raise DataError(f"{len(long)} example(s) longer than {max_tokens} tokens", advice=advice, details=shorten(long))
    return encoded
