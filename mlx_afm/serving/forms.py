"""Answers held to a form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_afm.errors import AFMError
from mlx_afm.serving.jobs import Processor
from mlx_afm.serving.refusal import Refusal
from mlx_afm.serving.requests import Asked
from mlx_afm.text.tokenizer import AFMTokenizer


def processor_of(asked: Asked, tokenizer: AFMTokenizer) -> Callable[[], Processor] | None:
    """Makes the processors that hold answers to calls of tools, or to a JSON schema; None if they are free.

    Raises:
        Refusal: a form that answers cannot be held to.
    """
    from mlx_afm.generation.guided import guided_processor
    from mlx_afm.generation.tool_choice import tool_call_processor

    if asked.must_call:
        form, param = partial(tool_call_processor, tokenizer, asked.must_call, one_call=asked.one_call), "tools"
    elif asked.schema is not None:
        form, param = partial(guided_processor, tokenizer, asked.schema), "response_format"
    else:
        return None

    def make() -> Processor:
        guided = form()

        def process(said: list[int], logits_1V: mx.array) -> mx.array:
            return guided(said, logits_1V)

        return process

    try:
        make()
    except AFMError as error:
        raise Refusal(400, str(error), code="invalid_value", param=param) from error
    return make
