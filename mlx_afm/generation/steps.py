"""Prompt to logits, and token after token for one row.

Unlike mlx-lm's `generate_step` the last piece of a prompt gives the first token by itself, without a step of one
token more; the last token is followed by no step that nobody reads; and randomness belongs to the row (`sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.sampling import LogitsProcessor, choose, log_probabilities
from mlx_afm.model import Model
from mlx_afm.model.cpu.layout import lay_out_for_decoding

Progress = Callable[[int, int], None]  # tokens of the prompt done and in all
TOKENS_TO_TIDY = 256  # freed memory is given back after so many steps, as mlx-lm does


class Step(NamedTuple):
    """One token of an answer.

    Attributes:
        token: its id.
        logprobs: log probabilities (V,), float32; not computed unless they are read.
        from_draft: whether a draft model proposed it.
    """

    token: int
    logprobs: mx.array
    from_draft: bool = False


def prefill(
    model: Model, ids: Sequence[int], cache: Sequence[Any], *, step_tokens: int, on_progress: Progress | None = None
) -> mx.array:
    """Logits (1, V) after the last of some ids, whose keys and values are stored.

    Args:
        ids: at least one.
        cache: from `make_cache`; what it holds comes before the ids.
        step_tokens: computed at once.
        on_progress: told after each piece.

    Cost: layers that reuse keys and values, and the head, are computed for the last token alone. On the CPU the first
    prompt lays out the model's matrices.
    """
    lay_out_for_decoding(model)
    last = (len(ids) - 1) // step_tokens * step_tokens
    for start in range(0, last, step_tokens):
        model.hidden(
            mx.array(list(ids[start : start + step_tokens]))[None], cache=cache
        )  # not computed: see the next line
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if on_progress is not None:
            on_progress(start + step_tokens, len(ids))
    logits = model.next_logits(mx.array(list(ids[last:]))[None], cache)
    if on_progress is not None:
        mx.eval(logits)
        on_progress(len(ids), len(ids))
    return logits


def iter_steps(
    model: Model,
    ids: Sequence[int],
    config: GenerateConfig,
    *,
    cache: Sequence[Any],
    cached_tokens: int = 0,
    max_tokens: int,
    logits_processors: Sequence[LogitsProcessor] = (),
    on_progress: Progress | None = None,
) -> Iterator[Step]:
    """The tokens that follow a prompt, without end tokens having any meaning.

    Args:
        ids: all of the prompt.
        config: how to choose.
        cache: holds the first `cached_tokens` ids, fewer than there are. Afterwards it holds the prompt and all
            tokens given out, but perhaps for the last.
        max_tokens: how many to give.
        logits_processors: change the logits before the choice.
    """
    logits = prefill(model, ids[cached_tokens:], cache, step_tokens=config.prefill_step_size, on_progress=on_progress)
    history = mx.array(list(ids)) if logits_processors else None

    def pick(logits: mx.array, number: int) -> tuple[mx.array, mx.array]:
        nonlocal history
        if history is not None:
            for process in logits_processors:
                logits = process(history, logits)
        token = choose(logits, [config], [number])
        if history is not None:
            history = mx.concatenate([history, token])
        return token, log_probabilities(logits)[0]

    token, logprobs = pick(logits, 0)
    mx.async_eval(token)  # type: ignore[no-untyped-call]
    for number in range(1, max_tokens + 1):
        following = token, logprobs
        if number < max_tokens:  # under way while the caller is busy with this one
            following = pick(model.next_logits(token[None], cache), number)
            mx.async_eval(following[0])  # type: ignore[no-untyped-call]
        yield Step(int(token.item()), logprobs)  # type: ignore[arg-type]
        token, logprobs = following
        if number % TOKENS_TO_TIDY == 0:
            mx.clear_cache()
