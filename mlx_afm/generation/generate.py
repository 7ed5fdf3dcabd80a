"""One prompt to text, piece by piece or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig, require_fitting
from mlx_afm.generation.engine import Engine
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.prefix_cache import PrefixCache
from mlx_afm.generation.prompts import Prompt, require_tokenizer, to_prompt_ids
from mlx_afm.generation.rows import LENGTH, STOP, FinishReason, Progress, Request, TokenEvent
from mlx_afm.generation.sampling import LogitsProcessor, Sampler
from mlx_afm.generation.speculation import Speculation, require_pair
from mlx_afm.generation.text_stream import TextStream
from mlx_afm.model import Model, backend
from mlx_afm.text.tokenizer import AFMTokenizer


@dataclass(frozen=True)
class GenerationResponse:
    """A token of an answer, with the fields of mlx-lm's class of this name, whose import takes seconds.

    Attributes:
        text: what the token adds to the text; often nothing.
        token: its id.
        logprobs: of all tokens (V,), float32, not evaluated.
        from_draft: whether a draft model proposed it.
        prompt_tokens, generation_tokens: counts so far.
        prompt_tps, generation_tps: tokens a second.
        peak_memory: of MLX in this process, in GB.
        finish_reason: "stop" or "length" with the last token, else None.
    """

    text: str
    token: int
    logprobs: mx.array | None
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None = None


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
) -> Iterator[GenerationResponse]:
    """One response per token, the last with its `finish_reason`.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        prompt: see `to_prompt_ids`.
        config: settings; or give single ones by name (`max_tokens=64, temp=0.7`).
        logits_processors: mlx-lm's: given all tokens so far (N,) and the logits (1, V), give other logits.
        prefix_cache: takes what the prompt has in common with others from there, and keeps this prompt's keys
            and values there.
        on_progress: told how many tokens of the prompt are computed, and of how many.
        speculation: a draft model that proposes tokens; counts what came of it.

    Raises:
        ConfigError: a folder without tokenizer, settings out of range, a prompt that fills the context or has
            an id outside the vocabulary, a draft model of another vocabulary.
        DataError: messages that the template cannot render.
    """
    tokenizer = require_tokenizer(tokenizer)
    config = GenerateConfig(**settings) if config is None else config
    require_fitting(config, model)
    if speculation is not None:
        require_pair(model, speculation.draft)
    ids = to_prompt_ids(tokenizer, prompt, vocabulary=model.args.vocab_size)
    held = decoder_of(model)
    engine = Engine(held.decoder, prefix_cache=prefix_cache, routes=held.routes, speculation=speculation)
    sampler = Sampler(config, processors=logits_processors, prompt=ids)
    request = Request(
        ids=ids,
        samplers=(sampler,),
        config=config,
        stop_token_ids=frozenset(tokenizer.eos_token_ids),
        on_progress=on_progress,
    )
    engine.add(request)
    yield from responses(engine, TextStream(tokenizer, config.stop), len(ids))


def responses(
    engine: Engine,
    text: TextStream,
    prompt_tokens: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[GenerationResponse, None, None]:
    """The tokens of an engine's only row, up to where the answer ends.

    Args:
        engine: has one request.
        text: makes text of the tokens.
        prompt_tokens: length of the prompt.
        should_stop: asked after every token, and the row is removed if it says so.
    """
    started, prompt_seconds, count = time.perf_counter(), 0.0, 0
    with backend.wired_weights():
        try:
            for event in _events(engine):
                now = time.perf_counter()
                count += 1
                if count == 1:
                    prompt_seconds, started = now - started, now
                piece = text.add(event.token).text
                over = text.stopped or event.finish_reason is not None
                if over:
                    piece += text.finish().text
                yield GenerationResponse(
                    text=piece,
                    token=event.token.token,
                    logprobs=event.logprobs_V,
                    from_draft=event.from_draft,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=prompt_tokens / prompt_seconds,
                    generation_tokens=count,
                    generation_tps=count / max(time.perf_counter() - started, 1e-9),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=(STOP if text.stopped else LENGTH) if over else None,
                )
                if over or should_stop():
                    return
        finally:
            engine.remove_all()


def _events(engine: Engine) -> Iterator[TokenEvent]:
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            yield event


def generate(
    model: Model,
    tokenizer: AFMTokenizer | None,
    prompt: Prompt,
    config: GenerateConfig | None = None,
    **options: Any,
) -> str:
    """The answer's text; see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, config, **options))
