"""Log probabilities of continuations: how likely a model finds given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.engine import Engine
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.prefix_cache import PrefixCache
from mlx_afm.generation.rows import Request, Row
from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.model import Model

Pair = tuple[Sequence[int], Sequence[int]]


def iter_loglikelihoods(
    model: Model, pairs: Sequence[Pair], *, alternatives: int = 1, prefix_cache: PrefixCache | None = None
) -> Iterator[tuple[int, Sequence[TokenLogprob]]]:
    """The number of each pair, from 0, and the log probability of each token of its continuation, as they are computed.

    Args:
        model: from `mlx_afm.load`.
        pairs: ids of a context, at least one, and of what follows it, at least one.
        alternatives: the most likely tokens to give with each.
        prefix_cache: see `Engine`; by default one of its own, so that a context with several continuations is computed
            once.

    Raises:
        ConfigError: an empty context, more tokens than the model's context has, or ids outside the vocabulary.
    """
    held, config = decoder_of(model), GenerateConfig()
    prefixes = PrefixCache() if prefix_cache is None else prefix_cache
    engine = Engine(held.decoder, prefix_cache=prefixes, routes=held.routes)
    numbers: dict[Row, int] = {}
    for number, (context, continuation) in enumerate(pairs):
        length = len(context)
        request = Request(
            ids=[*context, *continuation],
            config=config,
            max_tokens=0,
            prefix_boundaries=(length - 1,) if length > 1 else (),
            prompt_logprobs=alternatives,
            scored_from=length,
        )
        (row,) = engine.add(request)
        numbers[row] = number
    while engine.busy:
        for event in engine.step():
            yield numbers.pop(event.row), event.row.prompt_logprobs


def loglikelihoods(model: Model, pairs: Sequence[Pair], *, alternatives: int = 1) -> list[Sequence[TokenLogprob]]:
    """The same, in the order of the pairs."""
    found = dict(iter_loglikelihoods(model, pairs, alternatives=alternatives))
    return [found[number] for number in range(len(pairs))]
