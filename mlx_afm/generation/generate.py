"""One prompt to text, piece by piece or whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_afm.generation.answer_text import LENGTH, STOP, AnswerText
from mlx_afm.generation.config import GenerateConfig, require_fitting
from mlx_afm.generation.prompt_cache import PrefixCache, kind_of
from mlx_afm.generation.prompts import Prompt, require_tokenizer, to_prompt_ids
from mlx_afm.generation.sampling import LogitsProcessor
from mlx_afm.generation.speculation import Speculation
from mlx_afm.generation.speculative import iter_speculative_steps, plain_step_seconds
from mlx_afm.generation.steps import Progress, Step, iter_steps
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer


def stream_generate(
    model: Model,
    tokenizer: AFMTokenizer | None,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    *,
    logits_processors: Sequence[LogitsProcessor] = (),
    prefix_cache: PrefixCache | None = None,
    on_progress: Progress | None = None,
    speculation: Speculation | None = None,
    **settings: Any,
) -> Iterator[Any]:
    """mlx-lm's `GenerationResponse` objects, one per token, the last with its `finish_reason`.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        prompt: see `to_prompt_ids`.
        config: settings; or give single ones by name (`max_tokens=64, temp=0.7`).
        logits_processors: mlx-lm's: given all tokens so far (N,) and the logits (1, V), make other logits of them.
        prefix_cache: takes what the prompt has in common with others from there, and keeps this prompt's keys
            and values there.
        on_progress: told how many tokens of the prompt are computed, and of how many.
        speculation: a draft model that proposes tokens; counts what came of it.

    Raises:
        ConfigError: a folder without tokenizer, settings out of range, a prompt that fills the context or has
            an id outside the vocabulary.
        DataError: messages that the template cannot render.
    """
    tokenizer = require_tokenizer(tokenizer)
    config = GenerateConfig(**settings) if config is None else config
    require_fitting(config, model)
    ids = to_prompt_ids(tokenizer, prompt, vocabulary=model.args.vocab_size)
    max_tokens = config.answer_tokens(len(ids))
    cache, known = model.make_cache(quantized=config.kv_bits is not None), 0
    if prefix_cache is not None and (found := prefix_cache.fetch(ids, kind_of(None, config.kv_bits))) is not None:
        cache, known = found
    loop = iter_steps if speculation is None else partial(iter_speculative_steps, speculation=speculation)
    steps = loop(
        model,
        ids,
        config,
        cache=cache,
        cached_tokens=known,
        max_tokens=max_tokens,
        logits_processors=logits_processors,
        on_progress=on_progress,
    )
    try:
        yield from responses(model, steps, AnswerText(tokenizer, config.stop), len(ids), max_tokens)
        if speculation is not None and speculation.compares:
            speculation.plain_step_seconds = plain_step_seconds(model, cache, ids[-1])
    finally:
        if prefix_cache is not None and cache[0].size() >= len(ids):
            prefix_cache.store(ids, cache, kind_of(None, config.kv_bits))


def responses(
    model: Model, steps: Iterator[Step], text: AnswerText, prompt_tokens: int, max_tokens: int
) -> Iterator[Any]:
    """Tokens as mlx-lm's `GenerationResponse` objects, up to where the answer ends.

    Args:
        model: whose memory is wired meanwhile, where that means anything.
        steps: any loop's.
        text: makes text of them.
        prompt_tokens: length of the prompt.
        max_tokens: of the answer.
    """
    from mlx_lm.generate import GenerationResponse, wired_limit

    started, prompt_seconds = time.perf_counter(), 0.0
    with wired_limit(model):
        for count, step in enumerate(steps, 1):
            now = time.perf_counter()
            if count == 1:
                prompt_seconds, started = now - started, now
            piece, over = text.add(step.token), text.stopped or count == max_tokens
            if over:
                piece += text.end()
            yield GenerationResponse(
                text=piece,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tokens / prompt_seconds,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - started, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=(STOP if text.stopped else LENGTH) if over else None,
            )
            if over:
                return


def generate(
    model: Model,
    tokenizer: AFMTokenizer | None,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    **options: Any,
) -> str:
    """The answer's text; see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, config, **options))
