"""A request to jobs: which adapter, how answers are sampled and constrained, how long they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from mlx_afm.errors import AFMError
from mlx_afm.generation.engine import Request
from mlx_afm.generation.guided import GuidedProcessor, guided_processor
from mlx_afm.generation.prompts import EncodedPrompt
from mlx_afm.generation.sampling import LogitsProcessor, Sampler, import_filters
from mlx_afm.generation.text_stream import TextStream
from mlx_afm.generation.tool_choice import tool_call_processor
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.bodies import NO_LIMIT
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.jobs import ChoiceSink, Event, Job
from mlx_afm.serving.metrics import Metrics
from mlx_afm.serving.requests import CompletionRequest
from mlx_afm.text.tokenizer import AFMTokenizer


def require_model(name: str, base: str, adapters: Sequence[str]) -> str | None:
    """The adapter that a model id means; None for the base.

    Raises:
        APIError: neither (404).
    """
    if name == base:
        return None
    if name in adapters:
        return name
    expected = f"one of {', '.join((base, *adapters))}"
    raise APIError(
        404, "no such model", code="model_not_found", param="model", expected=expected, found=repr(name[:80])
    )


def plan_jobs(
    asked: CompletionRequest,
    adapter: str | None,
    tokenizer: AFMTokenizer,
    config: ServeConfig,
    metrics: Metrics,
    post: Callable[[Event], None],
    deadline: float,
) -> list[Job]:
    """A job for each prompt; choices are numbered through all of them.

    Raises:
        APIError: prompt and answer do not fit in the context; a schema or tools that cannot constrain an answer.
    """
    import_filters(asked.sampler.config)  # here, while the model's thread goes on with others
    new_constraint = constraint_of(asked, tokenizer)
    jobs = []
    for number, prompt in enumerate(asked.prompts):
        answer_tokens = _answer_tokens(asked, prompt, config)
        generation = replace(
            asked.sampler.config,
            max_tokens=max(answer_tokens, 1),
            kv_bits=config.kv_bits,
            prefill_step_size=config.prefill_tokens,
        )
        samplers = [
            Sampler(
                replace(generation, seed=(generation.seed + choice) % 2**64),
                top_logprobs=asked.sampler.top_logprobs,
                frequency_penalty=asked.sampler.frequency_penalty,
                presence_penalty=asked.sampler.presence_penalty,
                logit_bias=asked.sampler.logit_bias,
                processors=() if new_constraint is None else (new_constraint(),),
                prompt=prompt.ids,
            )
            for choice in range(asked.choices)
        ]
        request = Request(
            ids=prompt.ids,
            samplers=samplers,
            config=generation,
            stop_token_ids=frozenset(tokenizer.eos_token_ids),
            prefix_boundaries=prompt.prefix_boundaries,
            max_tokens=answer_tokens,
            prompt_logprobs=asked.sampler.top_logprobs if asked.echo else None,
        )
        first, keeps_tokens = number * asked.choices, asked.sampler.top_logprobs is not None
        text = tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
        sinks = [
            ChoiceSink(
                first + choice,
                TextStream(tokenizer, asked.stops, keeps_tokens=keeps_tokens),
                post,
                metrics,
                at_once=asked.stream,
                echo=text if asked.echo else "",
            )
            for choice in range(asked.choices)
        ]
        jobs.append(Job(adapter=adapter, request=request, sinks=sinks, deadline=deadline))
    return jobs


def constraint_of(asked: CompletionRequest, tokenizer: AFMTokenizer) -> Callable[[], LogitsProcessor] | None:
    """Makes the processor of one answer that constrains it to calls of tools or to a JSON schema; None without either.

    Raises:
        APIError: a schema that answers cannot be held to.
    """
    make: Callable[[], GuidedProcessor]
    if asked.forced_tools:
        make, param = partial(tool_call_processor, tokenizer, asked.forced_tools, one_call=asked.one_call), "tools"
    elif asked.schema is not None:
        make, param = partial(guided_processor, tokenizer, asked.schema), "response_format"
    else:
        return None
    try:
        make()
    except AFMError as error:
        raise APIError(400, str(error), code="invalid_value", param=param) from error
    return make


def _answer_tokens(asked: CompletionRequest, prompt: EncodedPrompt, config: ServeConfig) -> int:
    """The longest answer to a prompt."""
    left, wanted = config.context_tokens - len(prompt.ids), asked.max_tokens
    if left < (wanted != 0) or (wanted is not None and wanted > left):
        found = f"{len(prompt.ids)} of the prompt" + (f" and {wanted} of the answer" if (wanted or 0) > 0 else "")
        raise APIError(
            400,
            "prompt and answer do not fit in the context",
            code="context_length_exceeded",
            param="messages" if left < 1 else "max_tokens",
            expected=f"at most {config.context_tokens} tokens",
            found=found,
            advice="Shorten the prompt." if left < 1 else f"Ask for at most {left} tokens.",
        )
    if wanted is None:
        return min(config.max_tokens, left)
    return left if wanted == NO_LIMIT else wanted
