"""Answers to many prompts: their text, as rows of a batch finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

from mlx_afm.generation.answer_text import LENGTH, STOP, AnswerText
from mlx_afm.generation.batch import BATCH_SIZE, BatchGenerator, Request
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.prompt_cache import PrefixCache
from mlx_afm.generation.prompts import Prompt, require_tokenizer, to_prompt_ids
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without what ended it.
        tokens: all ids, with the end token if there was one.
        finish_reason: "stop" or "length".
        prompt_tokens: length of the prompt.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


def iter_answers(
    model: Model,
    tokenizer: AFMTokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int = BATCH_SIZE,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The number of each request, from 0, and its answer, as they finish.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        requests: see `Request`.
        batch_size: answered at once.
        prefix_cache: see `BatchGenerator`; by default one of its own, so that a common beginning is computed once.

    Raises:
        ConfigError: see `BatchGenerator.insert`; before anything is computed.
    """
    prefixes = PrefixCache() if prefix_cache is None else prefix_cache
    rows = BatchGenerator(model, tokenizer.eos_token_ids, batch_size=batch_size, prefix_cache=prefixes)
    for request in requests:
        rows.insert(request)
    texts: dict[int, _Text] = {}
    while rows.busy:
        for step in rows.step():
            request = requests[step.row]
            row = texts.setdefault(step.row, _Text(AnswerText(tokenizer, request.config.stop)))
            row.add(step.token)
            if step.finish_reason is not None or row.text.stopped:
                rows.remove(step.row)
                yield step.row, texts.pop(step.row).answer(len(request.ids))


class _Text:
    """What a row has said so far."""

    def __init__(self, text: AnswerText) -> None:
        self.text = text
        self.pieces: list[str] = []
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.pieces.append(self.text.add(token))

    def answer(self, prompt_tokens: int) -> Answer:
        self.pieces.append(self.text.end())
        return Answer("".join(self.pieces), self.tokens, STOP if self.text.stopped else LENGTH, prompt_tokens)


def seeded(config: GenerateConfig, number: int) -> GenerateConfig:
    """The settings of a row: its seed is the common one plus its number, so that equal prompts differ."""
    return replace(config, seed=(config.seed + number) % 2**64)


def batch_generate(
    model: Model,
    tokenizer: AFMTokenizer | None,
    prompts: str | Sequence[Prompt],
    config: GenerateConfig | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    prefix_cache: PrefixCache | None = None,
    **settings: Any,
) -> list[Answer]:
    """Answers to many prompts, in their order; see `generate` for one.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        prompts: of each form that `to_prompt_ids` takes. A string, a list of message dicts, or ids are one
            prompt, and the result a list of one answer.
        config: settings; or give single ones by name. Row n draws with `seed + n`.
        batch_size, prefix_cache: see `iter_answers`.

    Raises:
        DataError, ConfigError: see `stream_generate`.
    """
    tokenizer = require_tokenizer(tokenizer)
    config = GenerateConfig(**settings) if config is None else config
    rows = model.args.vocab_size
    several: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # type: ignore[list-item]
    requests = []
    for number, prompt in enumerate(several):
        ids = to_prompt_ids(tokenizer, prompt, vocabulary=rows, where=f"prompts, prompt {number}")
        requests.append(Request(ids=ids, config=seeded(config, number)))
    found = dict(iter_answers(model, tokenizer, requests, batch_size=batch_size, prefix_cache=prefix_cache))
    return [found[number] for number in range(len(requests))]


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt rather than several: a text, message dicts, or ids."""
    if isinstance(prompts, str) or hasattr(prompts, "tolist"):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], (Mapping, Number))
