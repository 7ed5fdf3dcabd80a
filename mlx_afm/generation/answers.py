"""Answers to many prompts: their text, as rows of a batch finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.engine import BATCH_SIZE, Engine
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.prefix_cache import PrefixCache
from mlx_afm.generation.prompts import Prompt, require_tokenizer, to_prompt_ids
from mlx_afm.generation.rows import LENGTH, STOP, Request, Row
from mlx_afm.generation.speculation import Speculation
from mlx_afm.generation.text_stream import TextStream
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
    speculation: Speculation | None = None,
) -> Iterator[tuple[int, Answer]]:
    """The number of each request, from 0, and its answer, as they finish.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        requests: see `Request`.
        batch_size: answered at once.
        prefix_cache: see `Engine`; by default one of its own, so that a common beginning is computed once.
        speculation: a draft model that proposes tokens to all rows; counts what came of it.

    Raises:
        ConfigError: see `Engine.add`; before anything is computed.
    """
    held = decoder_of(model)
    prefixes = PrefixCache() if prefix_cache is None else prefix_cache
    engine = Engine(
        held.decoder, batch_size=batch_size, prefix_cache=prefixes, routes=held.routes, speculation=speculation
    )
    ends = frozenset(tokenizer.eos_token_ids)
    numbers: dict[Row, int] = {}
    texts: dict[Row, _Text] = {}
    for number, request in enumerate(requests):
        (row,) = engine.add(replace(request, stop_token_ids=ends))
        numbers[row] = number
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            row = event.row
            text = texts.setdefault(row, _Text(TextStream(tokenizer, row.request.config.stop)))
            text.add(event.token.token)
            if event.finish_reason is not None or text.stream.stopped:
                engine.remove([row])
                yield numbers.pop(row), texts.pop(row).answer(row)


class _Text:
    """The text of a row so far."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.pieces: list[str] = []

    def add(self, token: int) -> None:
        self.pieces.append(self.stream.add(token).text)

    def answer(self, row: Row) -> Answer:
        self.pieces.append(self.stream.finish().text)
        reason = STOP if self.stream.stopped else LENGTH
        return Answer("".join(self.pieces), row.tokens, reason, len(row.request.ids))


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
    speculation: Speculation | None = None,
    **settings: Any,
) -> list[Answer]:
    """Answers to many prompts, in their order; see `generate` for one.

    Args:
        model, tokenizer: from `mlx_afm.load`.
        prompts: of each form that `to_prompt_ids` takes. A string, a list of message dicts, or ids are one
            prompt, and the result a list of one answer.
        config: settings; or give single ones by name. Row n draws with `seed + n`.
        batch_size, prefix_cache, speculation: see `iter_answers`.

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
    options: dict[str, Any] = {"batch_size": batch_size, "prefix_cache": prefix_cache, "speculation": speculation}
    found = dict(iter_answers(model, tokenizer, requests, **options))
    return [found[number] for number in range(len(requests))]


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt rather than several: a text, message dicts, or ids."""
    if isinstance(prompts, str) or hasattr(prompts, "tolist"):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], (Mapping, Number))
