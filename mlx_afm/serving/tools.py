"""Answers held to a form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_afm.errors import AFMError
from mlx_afm.serving.jobs import Processor
from mlx_afm.serving.refusal import Refusal
from mlx_afm.text.tokenizer import AFMTokenizer


def processor_of(tokenizer: AFMTokenizer, schema: Mapping[str, Any]) -> Callable[[], Processor]:
    """Makes the processors that hold an answer to a JSON schema.

    Raises:
        Refusal: a schema that answers cannot be held to.
    """
    from mlx_afm.generation.guided import guided_processor

    def make() -> Processor:
        guided = guided_processor(tokenizer, schema)

        def process(said: list[int], logits_1V: mx.array) -> mx.array:
            return guided(said, logits_1V)

        return process

    try:
        make()
    except AFMError as error:
        raise Refusal(400, str(error), code="invalid_value", param="response_format") from error
    return make
