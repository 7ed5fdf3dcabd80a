"""Prompts to ids, ids to text: one conversation at a time, through mlx-lm's `stream_generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_afm.errors import ConfigError
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.model import Model
from mlx_afm.text.messages import parse_messages
from mlx_afm.text.template import encode, render
from mlx_afm.text.tokenizer import AFMTokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


def to_prompt_ids(tokenizer: AFMTokenizer, prompt: Prompt) -> list[int]:
    """Ids that end where the answer begins.

    Args:
        tokenizer: the model's.
        prompt: a user's text, a list of message dicts, or ids, which are taken as they are.

    Raises:
        DataError: messages that the template cannot render. ConfigError: an empty prompt.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise ConfigError("an empty prompt")
    if all(isinstance(item, int) for item in prompt):
        return [int(item) for item in prompt]  # type: ignore[arg-type]
    messages = parse_messages(list(prompt), where="prompt", special_pieces=tokenizer.special_pieces)
    return encode(render(messages, add_generation_prompt=True), tokenizer).ids


def stream_generate(
    model: Model, tokenizer: AFMTokenizer | None, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any
) -> Iterator[Any]:
    """mlx-lm's `GenerationResponse` objects, one per token, the last with its `finish_reason`.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        prompt: see `to_prompt_ids`.
        config: settings; or give single ones by name (`max_tokens=64, temp=0.7`).

    Raises:
        ConfigError: a folder without tokenizer, settings out of range.
    """
    from mlx_lm import stream_generate as mlx_lm_stream
    from mlx_lm.sample_utils import make_sampler

    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", advice="Convert again with tokenizer.model in place.")
    config = GenerateConfig(**settings) if config is None else config
    if config.top_k >= model.args.vocab_size:
        expected = f"less than the {model.args.vocab_size} tokens there are, or 0 for all"
        raise ConfigError("top_k is too large", expected=expected, found=config.top_k)
    ids = to_prompt_ids(tokenizer, prompt)
    mx.random.seed(config.seed)
    sampler = make_sampler(temp=config.temp, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p)
    cache = {} if config.kv_bits is None else {"prompt_cache": model.make_cache(quantized=True)}
    yield from mlx_lm_stream(model, tokenizer, ids, max_tokens=config.max_tokens, sampler=sampler, **cache)


def generate(
    model: Model, tokenizer: AFMTokenizer | None, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any
) -> str:
    """The answer's text; see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, config, **settings))
