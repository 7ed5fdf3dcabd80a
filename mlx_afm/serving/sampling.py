"""One token for each row, by its own settings and its own random numbers: no row sees another.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from mlx_afm.generation.sampling import choose, log_probabilities
from mlx_afm.serving.jobs import Processor, Said, Sampling

Told = tuple[mx.array, ...]  # log probability of a token; the most likely tokens (N,); theirs (N,)


@dataclass(eq=False)
class Chooser:
    """Picks the tokens of one answer, as `generate` would with the same settings.

    Args:
        sampling: how.
        number: of the answer to its prompt, from 0; it is added to the seed.
        processor: changes logits first.
    """

    sampling: Sampling
    number: int
    processor: Processor | None = None
    said: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.sampling.config
        self.config = replace(config, seed=(config.seed + self.number) % 2**64)

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are not taken as they are."""
        ours = self.sampling
        return bool(self.processor or ours.frequency_penalty or ours.presence_penalty or ours.logit_bias)

    def changed(self, logits_1V: mx.array) -> mx.array:
        """The logits after penalties, bias and processor."""
        amounts: defaultdict[int, float] = defaultdict(float)
        for token, count in Counter(self.said).items():
            amounts[token] -= count * self.sampling.frequency_penalty + self.sampling.presence_penalty
        for token, bias in self.sampling.logit_bias.items():
            amounts[token] += bias
        if amounts:
            logits_1V = logits_1V.at[:, mx.array(list(amounts))].add(mx.array(list(amounts.values()), logits_1V.dtype))
        return logits_1V if self.processor is None else self.processor(self.said, logits_1V)


@dataclass(frozen=True)
class Chosen:
    """Tokens (B,) that are chosen, perhaps still being computed, and what is to be told of each."""

    tokens_B: mx.array
    told: list[Told]

    def read(self) -> list[Said]:
        """The tokens; waits for them."""
        mx.eval(self.tokens_B, self.told)
        tokens: list[int] = self.tokens_B.tolist()  # type: ignore[assignment]
        return [_said(token, arrays) for token, arrays in zip(tokens, self.told)]

    def rows(self, indices: Sequence[int]) -> Chosen:
        """Those of some rows, in this order."""
        return Chosen(self.tokens_B[mx.array(list(indices))], [self.told[index] for index in indices])

    def joined(self, other: Chosen) -> Chosen:
        """Those of other rows behind these."""
        return Chosen(mx.concatenate([self.tokens_B, other.tokens_B]), self.told + other.told)


def changed_logits(choosers: Sequence[Chooser], logits_BV: mx.array) -> tuple[mx.array, dict[int, Exception]]:
    """The logits (B, V) after what changes them, and the rows where that failed, whose logits are as they were."""
    if not any(chooser.changes_logits for chooser in choosers):
        return logits_BV, {}
    rows, faults = [logits_BV[row : row + 1] for row in range(len(choosers))], {}
    for number, chooser in enumerate(choosers):
        # A schema that trips its processor, in whatever way, is the fault of one answer and of no other.
        try:
            rows[number] = chooser.changed(rows[number]) if chooser.changes_logits else rows[number]
        except Exception as error:
            faults[number] = error
    return mx.concatenate(rows), faults


def choose_next(choosers: Sequence[Chooser], logits_BV: mx.array, changed_BV: mx.array, *, unread: int) -> Chosen:
    """The next token of each row, under way when this returns.

    Args:
        choosers: of each row.
        logits_BV: of the model; log probabilities are told of these.
        changed_BV: what tokens are chosen by.
        unread: tokens of each row that are chosen but were not said yet.
    """
    numbers = [len(chooser.said) + unread for chooser in choosers]
    tokens_B = choose(changed_BV, [chooser.config for chooser in choosers], numbers)
    told = [
        () if (count := chooser.sampling.top_logprobs) is None else _told(logits_BV[row], tokens_B[row], count)
        for row, chooser in enumerate(choosers)
    ]
    mx.async_eval(tokens_B, told)  # type: ignore[no-untyped-call]
    return Chosen(tokens_B, told)


def _told(logits_V: mx.array, token: mx.array, alternatives: int) -> Told:
    logprobs_V = log_probabilities(logits_V)
    if not alternatives:
        return (logprobs_V[token],)
    best = mx.argpartition(-logprobs_V, kth=alternatives - 1)[:alternatives]
    return logprobs_V[token], best, logprobs_V[best]


def _said(token: int, told: Told) -> Said:
    if not told:
        return Said(token)
    top: list[tuple[int, float]] = list(zip(*(array.tolist() for array in told[1:])))  # type: ignore[arg-type]
    logprob: float = told[0].item()  # type: ignore[assignment]
    return Said(token, logprob, tuple(sorted(top, key=lambda pair: (-pair[1], pair[0]))))
