"""A request to jobs for the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_afm.generation.sampling import narrowed
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.forms import processor_of
from mlx_afm.serving.jobs import Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.prompts import Prompt
from mlx_afm.serving.refusal import Refusal
from mlx_afm.serving.requests import Asked
from mlx_afm.serving.sinks import ChoiceSink, Event
from mlx_afm.serving.text import TextStream
from mlx_afm.text.tokenizer import AFMTokenizer


def require_model(name: str, base: str, adapters: Sequence[str]) -> str | None:
    """The adapter that a model id means; None for the base.

    Raises:
        Refusal: neither (404).
    """
    if name == base:
        return None
    if name in adapters:
        return name
    expected = f"one of {', '.join((base, *adapters))}"
    raise Refusal(404, "no such model", code="model_not_found", param="model", expected=expected, found=repr(name[:80]))


def plan_jobs(
    asked: Asked,
    adapter: str | None,
    tokenizer: AFMTokenizer,
    config: ServeConfig,
    metrics: Metrics,
    post: Callable[[Event], None],
    deadline: float,
) -> list[Job]:
    """A job for each prompt, its choices numbered on.

    Raises:
        Refusal: prompt and answer do not fit in the context; a schema or tools that answers cannot be held to.
    """
    # Its first use imports mlx-lm, which takes seconds: here, while the model's thread goes on with others.
    narrowed(mx.zeros((1, tokenizer.vocab_size)), asked.sampling.config)
    processor = processor_of(asked, tokenizer)
    jobs = []
    for number, prompt in enumerate(asked.prompts):
        sinks = [
            ChoiceSink(
                number * asked.choices + choice,
                TextStream(tokenizer, asked.stops, asked.sampling.top_logprobs is not None),
                post,
                metrics,
                at_once=asked.stream,
            )
            for choice in range(asked.choices)
        ]
        jobs.append(
            Job(
                adapter=adapter,
                ids=prompt.ids,
                cuts=prompt.cuts,
                max_tokens=_room(asked, prompt, config),
                sampling=asked.sampling,
                ends=frozenset(tokenizer.eos_token_ids),
                sinks=sinks,
                deadline=deadline,
                processor=processor,
            )
        )
    return jobs


def _room(asked: Asked, prompt: Prompt, config: ServeConfig) -> int:
    """Tokens that an answer may have."""
    left, length = config.context_tokens - len(prompt.ids), len(prompt.ids)
    wanted = asked.max_tokens
    if left < 1 or (wanted is not None and wanted > left):
        found = f"{length} of the prompt" + ("" if wanted is None else f" and {wanted} of the answer")
        raise Refusal(
            400,
            "prompt and answer do not fit in the context",
            code="context_length_exceeded",
            param="messages" if left < 1 else "max_tokens",
            expected=f"at most {config.context_tokens} tokens",
            found=found,
            advice="Shorten the prompt." if left < 1 else f"Ask for at most {left} tokens.",
        )
    return min(config.max_tokens, left) if wanted is None else wanted
