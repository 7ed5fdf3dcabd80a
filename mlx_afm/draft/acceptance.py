"""How much of what a draft model proposes its target accepts, and what that gives.

A target's pass over k proposals gives 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k tokens on average, a_j the chance that the
jth is accepted once those before it were. With the draft's time c for a token, in passes of the target, the speed-up
is that over 1 + k c.

Shape suffixes: B rows, N output positions, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_afm.data import Batch, Tokens, padded_batch
from mlx_afm.draft.losses import acceptance, iter_log_probabilities
from mlx_afm.errors import DataError
from mlx_afm.model import Model
from mlx_afm.training.loss import Head

LENGTHS = tuple(range(1, 9))  # proposals a pass that are considered
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64)  # in an answer, where the table begins a new row

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AcceptanceReport:
    """What of a draft's proposals is accepted on some data, whose answers stand for the text so far.

    Attributes:
        tokens: positions that were looked at.
        sampled: mean chance at temperature 1, sum min(p, q).
        greedy: share of positions at which both have the same likeliest token.
        by_position: (first position, positions, sampled, greedy) from the beginning of the answer.
        tokens_per_pass: for each k of `LENGTHS`, what a pass gives, sampled.
        greedy_tokens_per_pass: the same for greedy decoding.
    """

    tokens: int
    sampled: float
    greedy: float
    by_position: tuple[tuple[int, int, float, float], ...]
    tokens_per_pass: tuple[float, ...]
    greedy_tokens_per_pass: tuple[float, ...]

    def speed_ups(self, cost_ratio: float, *, greedy: bool = True) -> tuple[float, ...]:
        """Predicted for each k of `LENGTHS`: tokens a pass over its time.

        Args:
            cost_ratio: the draft's time of a token in target's passes.
            greedy: of greedy decoding, else sampled at temperature 1.
        """
        given = self.greedy_tokens_per_pass if greedy else self.tokens_per_pass
        return tuple(tokens / (1 + k * cost_ratio) for k, tokens in zip(LENGTHS, given))

    def best_length(self, cost_ratio: float, *, greedy: bool = True) -> int:
        """The number of proposals with the largest predicted speed-up; 0 if none is above 1."""
        found = self.speed_ups(cost_ratio, greedy=greedy)
        return 0 if max(found) <= 1 else LENGTHS[found.index(max(found))]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("position", "tokens", "sampled", "greedy")
        return {
            "tokens": self.tokens,
            "sampled": self.sampled,
            "greedy": self.greedy,
            "by_position": [dict(zip(names, row)) for row in self.by_position],
            "tokens_per_pass": dict(zip(map(str, LENGTHS), self.tokens_per_pass)),
            "greedy_tokens_per_pass": dict(zip(map(str, LENGTHS), self.greedy_tokens_per_pass)),
        }


def break_even(length: int, cost_ratio: float) -> float:
    """The chance of acceptance, alike everywhere, at which k proposals cost as much as they give; above 1 if none does.

    Source: (1 - a^(k+1)) / (1 - a) = 1 + k c, solved by bisection.
    """
    wanted = 1 + length * cost_ratio
    if wanted >= length + 1:
        return float("inf")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(length + 1)) < wanted else (low, middle)
    return high


def measure_acceptance(
    draft: Model,
    wanted_of: Callable[[Batch], mx.array],
    teacher_head: Head,
    data: Sequence[Tokens],
    *,
    batch_size: int = 8,
    on_batches: Callable[[int, int], None] = lambda done, total: None,
) -> AcceptanceReport:
    """Acceptance at the trained positions of some examples.

    Args:
        draft: the draft model.
        wanted_of: the target's final hidden states at the trained positions of a batch, (B, N, D).
        teacher_head: these to logits.
        data: encoded examples.
        batch_size: examples at once.
        on_batches: told how many batches are done, and how many there are.

    Raises:
        DataError: no trained token.
    """
    training = draft.training
    draft.eval()
    sampled: list[Floats] = []
    greedy: list[Floats] = []
    starts = range(0, len(data), batch_size)
    for done, start in enumerate(starts, 1):
        batch = padded_batch([data[index] for index in range(start, min(start + batch_size, len(data)))])
        chances, equal = _chances(draft, batch, wanted_of(batch), teacher_head)
        for row, first, second in zip(batch.rows, chances, equal):
            count = int(np.count_nonzero(row.weights[1:]))
            if count:
                sampled.append(first[:count].astype(np.float64))
                greedy.append(second[:count].astype(np.float64))
        on_batches(done, len(starts))
    draft.train(training)
    if not sampled:
        raise DataError("no trained tokens", kind="no-examples")
    return summed_up(sampled, greedy)


def summed_up(sampled: Sequence[Floats], greedy: Sequence[Floats]) -> AcceptanceReport:
    """The figures, from the chances at each position of each answer."""
    rows = []
    for first, end in zip(POSITIONS, (*POSITIONS[1:], None)):
        parts = [(one[first:end], other[first:end]) for one, other in zip(sampled, greedy) if len(one) > first]
        if parts:
            means = [float(np.concatenate(side).mean()) for side in zip(*parts)]
            rows.append((first, sum(len(part) for part, _ in parts), means[0], means[1]))
    return AcceptanceReport(
        tokens=sum(map(len, sampled)),
        sampled=float(np.concatenate(sampled).mean()),
        greedy=float(np.concatenate(greedy).mean()),
        by_position=tuple(rows),
        tokens_per_pass=tuple(_tokens_per_pass(sampled, k) for k in LENGTHS),
        greedy_tokens_per_pass=tuple(_tokens_per_pass(greedy, k) for k in LENGTHS),
    )


def _tokens_per_pass(chances: Sequence[Floats], length: int) -> float:
    """Tokens of an answer over the passes that it takes on average, each with so many proposals.

    An answer of n tokens: from each place the next pass starts where the first refused token is replaced.
    """
    tokens = passes = 0.0
    for row in chances:
        reach = np.zeros(len(row) + 1)  # how often a pass starts at each place
        reach[0] = 1.0
        for place in range(len(row)):
            left, kept = reach[place], 1.0
            passes += left
            for step in range(length + 1):
                here = place + step
                if here >= len(row):
                    break
                accepted = kept * row[here] if step < length else 0.0
                reach[here + 1] += left * (kept - accepted)  # its own token ends the pass here
                kept = accepted
        tokens += len(row)
    return tokens / passes


def _chances(
    draft: Model, batch: Batch, wanted_BND: mx.array, teacher_head: Head
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Chance of acceptance and whether the likeliest tokens are equal, (B, N) each."""
    chances, equal = [], []
    for _, log_q, log_p in iter_log_probabilities(draft, batch, wanted_BND, teacher_head):
        chances.append(acceptance(log_q, log_p))
        equal.append(mx.argmax(log_q, axis=-1) == mx.argmax(log_p, axis=-1))
        mx.eval(chances[-1], equal[-1])
    shape = batch.output_positions_BN.shape
    return np.array(mx.concatenate(chances)).reshape(shape), np.array(mx.concatenate(equal)).reshape(shape)
