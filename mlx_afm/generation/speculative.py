"""Speculative decoding of a batch: a draft model proposes tokens, and one pass of the target judges those of all rows.

Each row accepts its own number of tokens; what it refuses lowers its own length and moves nobody else. Greedy answers
are those of plain decoding. SampledTokens ones are distributed as the target's, by one of two rules:

- A fixed number of proposals: they are accepted with probability min(1, p / q), and the token behind them is drawn from
  what p has more than q. Of all rules this accepts the most.
- A number that adapts to measured times, and rows whose logits depend on their tokens (penalties, constraints): a
  proposal is accepted if it is the token that plain decoding samples. Draft and target draw with the same noise at each
  place, so that they mostly agree, and the answer is that of plain decoding whatever the number of proposals is.

Shape suffixes: B rows, N proposed tokens, M one more, V vocabulary.
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023, algorithm 1;
Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024, Gumbel
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.rows import Row
from mlx_afm.generation.sampling import (
    SampledTokens,
    Sampler,
    TokenLogprob,
    choose_tokens,
    filter_logits,
    log_probabilities,
    sampled_tokens,
)

_STRIDE = 0xD1342543DE82EF95  # odd, and another than of plain sampling
_ROLLS = 128  # drawn at once, so that a row's rolls do not depend on how many others need


@dataclass(frozen=True)
class Proposals:
    """What the draft model proposed.

    Attributes:
        tokens_BN: int32.
        logits_BNV: that they were drawn from.
    """

    tokens_BN: mx.array
    logits_BNV: mx.array


@dataclass(frozen=True)
class Verdict:
    """What the target made of some proposals.

    Attributes:
        accepted: of each row, how many.
        own: each row's token behind these, the target's own.
    """

    accepted: list[int]
    own: SampledTokens
    _tokens: list[list[int]]
    _rows: Sequence[Row]
    _logits_BMV: mx.array
    _processed: Mapping[int, Sequence[mx.array]]

    def tokens(self, index: int) -> list[tuple[TokenLogprob, Callable[[], mx.array]]]:
        """A row's accepted tokens, each with what gives its logits (1, V) after penalties and processors."""
        sampler, ids = self._rows[index].sampler, self._tokens[index]
        found: list[tuple[TokenLogprob, Callable[[], mx.array]]] = []
        for place in range(self.accepted[index]):
            told = TokenLogprob(ids[place])
            if sampler.top_logprobs is not None:
                token = mx.array(ids[place : place + 1], mx.int32)
                logits_1V, processed_1V = self._logits(index, place), self._processed_logits(index, place)
                (told,) = sampled_tokens([sampler], token, logits_1V, processed_1V).read()
            found.append((told, partial(self._processed_logits, index, place)))
        return found

    def _logits(self, index: int, place: int) -> mx.array:
        return self._logits_BMV[index, place : place + 1]

    def _processed_logits(self, index: int, place: int) -> mx.array:
        held = self._processed.get(index)
        return self._logits(index, place) if held is None else held[place]


def length_needed(row: Row, *, fixed: bool) -> int:
    """Proposals that can be of use to a row which has one token to come besides.

    A row that is sampled by the rule of a fixed number takes all its tokens from rounds, also the last: what it draws
    must not depend on how many proposals its neighbours need.
    """
    left = row.max_tokens - len(row.tokens)
    return left if _is_drawn(row, fixed=fixed) else left - 1


def propose_tokens(rows: Sequence[Row], logits_BV: mx.array, proposed: Sequence[mx.array]) -> mx.array:
    """The next token that the draft model says for each row, int32 (B,), behind some that it proposed, each (B,)."""
    samplers = [row.sampler for row in rows]
    configs, places = [sampler.config for sampler in samplers], [len(row.tokens) + len(proposed) for row in rows]
    dependent = [index for index, sampler in enumerate(samplers) if sampler.changes_logits]
    if dependent:
        known: list[list[int]] = [[]] * len(rows)
        if proposed:
            known = mx.stack(list(proposed), axis=1).tolist()  # type: ignore[assignment]
        changed = [logits_BV[index : index + 1] for index in range(len(rows))]
        for index in dependent:
            with _behind(samplers[index], known[index]):
                changed[index] = samplers[index].processed(changed[index])
            samplers[index].error = None  # what fails for a proposal may never be said
        logits_BV = mx.concatenate(changed)
    return choose_tokens(logits_BV, configs, places)


def judge(rows: Sequence[Row], judged_BMV: mx.array, proposals: Proposals, *, fixed: bool) -> Verdict:
    """How many proposals each row accepts, and its own token behind these.

    Args:
        rows: each with the token before the proposals as its last one.
        judged_BMV: the target's logits after that token and after each proposed one.
        proposals: one less a row.
        fixed: the number of proposals does not adapt, see the module.

    Cost: one wait for the device, and one for each token of a row whose logits depend on its tokens.
    """
    dependent = [index for index, row in enumerate(rows) if row.sampler.changes_logits]
    drawn = [index for index, row in enumerate(rows) if _is_drawn(row, fixed=fixed)]
    equal = [index for index in range(len(rows)) if index not in dependent and index not in drawn]
    pairs = [_accept_drawn(rows[index], judged_BMV[index], proposals, index) for index in drawn]
    if equal:
        chosen = slice(None) if len(equal) == len(rows) else mx.array(equal)
        pairs.append(_accept_equal([rows[i] for i in equal], judged_BMV[chosen], proposals.tokens_BN[chosen]))
    mx.eval(proposals.tokens_BN, pairs)  # the one wait
    tokens: list[list[int]] = proposals.tokens_BN.tolist()  # type: ignore[assignment]
    found = dict(zip([*drawn, *equal], (both for pair in pairs for both in _columns(pair))))
    processed: dict[int, list[mx.array]] = {}
    for index in dependent:
        count, own_token, processed[index] = _accept_sampled(rows[index], judged_BMV[index], tokens[index])
        found[index] = count, own_token
    accepted, own = (list(column) for column in zip(*(found[index] for index in range(len(rows)))))
    logits_BV = judged_BMV[mx.arange(len(rows)), mx.array(accepted)]
    last = [processed[row][-1] if row in processed else logits_BV[row : row + 1] for row in range(len(rows))]
    processed_BV = mx.concatenate(last) if processed else logits_BV
    samplers = [row.sampler for row in rows]
    own_tokens = sampled_tokens(samplers, mx.array(own, mx.int32), logits_BV, processed_BV)
    return Verdict(accepted, own_tokens, tokens, rows, judged_BMV, processed)


def _is_drawn(row: Row, *, fixed: bool) -> bool:
    """Whether the rule of a fixed number of proposals decides about a row's, see the module."""
    return fixed and row.sampler.config.temp > 0 and not row.sampler.changes_logits


def _columns(pair: tuple[mx.array, mx.array]) -> list[tuple[int, int]]:
    """Pairs of numbers from a pair of arrays (B,) or scalars."""
    return list(zip(*(array.reshape(-1).tolist() for array in pair)))  # type: ignore[arg-type]


def _accept_equal(rows: Sequence[Row], judged_BMV: mx.array, proposed_BN: mx.array) -> tuple[mx.array, mx.array]:
    """How many proposals are what plain decoding samples, and what it samples behind these; int32 (B,) each."""
    batch, count, vocabulary = judged_BMV.shape
    configs = [row.sampler.config for row in rows for _ in range(count)]
    places = [len(row.tokens) + step for row in rows for step in range(count)]
    sampled_BM = choose_tokens(judged_BMV.reshape(-1, vocabulary), configs, places).reshape(batch, count)
    accepted_B = mx.cumprod((sampled_BM[:, :-1] == proposed_BN).astype(mx.int32), axis=1).sum(axis=1)
    return accepted_B, mx.take_along_axis(sampled_BM, accepted_B[:, None], axis=1)[:, 0]


def _accept_drawn(row: Row, judged_MV: mx.array, proposals: Proposals, index: int) -> tuple[mx.array, mx.array]:
    config = row.sampler.config
    key = mx.random.key((config.seed + len(row.tokens) * _STRIDE) % 2**64)
    target_MV, draft_NV = (_probabilities(logits, config) for logits in (judged_MV, proposals.logits_BNV[index]))
    return verify_sampled(target_MV, draft_NV, proposals.tokens_BN[index], key)


def _probabilities(logits: mx.array, config: GenerateConfig) -> mx.array:
    """Of every token to be sampled, (..., V) float32: what plain sampling with these settings draws from."""
    return mx.softmax(filter_logits(log_probabilities(logits), config) / config.temp, axis=-1)


def verify_sampled(
    target_MV: mx.array, draft_NV: mx.array, proposed_N: mx.array, key: mx.array
) -> tuple[mx.array, mx.array]:
    """How many tokens drawn from the draft's probabilities to accept, and the token after these.

    A token is accepted with probability min(1, target / draft). After the first that is not, one is drawn from
    max(target - draft, 0), brought to the sum 1; after the last, from the target's. So each token given out has the
    target's probability.

    Args:
        target_MV: the target's probabilities after the last token and after each proposed one, float32.
        draft_NV: the draft's, from which the proposed tokens were drawn.
        proposed_N: these.
        key: of the randomness.

    Returns: two int32 scalars.
    """
    count = proposed_N.shape[0]
    roll_key, own_key = mx.random.split(key)
    rolls_N = mx.random.uniform(shape=(_ROLLS,), key=roll_key)[:count]
    target_N = mx.take_along_axis(target_MV[:count], proposed_N[:, None], axis=-1)[:, 0]
    draft_N = mx.take_along_axis(draft_NV, proposed_N[:, None], axis=-1)[:, 0]
    accepted = mx.cumprod((rolls_N * draft_N < target_N).astype(mx.int32)).sum()
    left_MV = mx.maximum(target_MV - mx.pad(draft_NV, [(0, 1), (0, 0)]), 0)
    left_V, target_V = left_MV[accepted], target_MV[accepted]
    left_V = mx.where(left_V.sum() > 0, left_V, target_V)  # equal up to rounding: nothing is left of the difference
    own = mx.argmax(mx.log(left_V) + mx.random.gumbel(left_V.shape, key=own_key))
    return accepted, own.astype(mx.int32)


def _accept_sampled(row: Row, judged_MV: mx.array, proposed: Sequence[int]) -> tuple[int, int, list[mx.array]]:
    """The same, one token after the other, for a row whose logits depend on its tokens.

    Returns: accepted tokens, the own one, and the processed logits (1, V) of all of them. After a failure the row's
        sampler has the error; after a stop token or the last token of the answer the own one has no meaning.
    """
    sampler, processed = row.sampler, []
    for count in range(len(proposed) + 1):
        with _behind(sampler, proposed[:count]):
            processed.append(sampler.processed(judged_MV[count : count + 1]))
        if sampler.error is not None:
            return count, 0, processed
        place = len(row.tokens) + count
        token = int(choose_tokens(processed[-1], [sampler.config], [place]).item())  # type: ignore[arg-type]
        if count == len(proposed) or token != proposed[count]:
            break
        if token in row.request.stop_token_ids or place + 1 >= row.max_tokens:
            return count + 1, 0, [*processed, judged_MV[count + 1 : count + 2]]
    return count, token, processed


@contextmanager
def _behind(sampler: Sampler, tokens: Sequence[int]) -> Iterator[None]:
    """The sampler as if these tokens had been given out too."""
    count = len(sampler.tokens)
    sampler.tokens.extend(tokens)
    try:
        yield
    finally:
        del sampler.tokens[count:]
