"""Many rendered examples to tokens at once: what `encode` does for one, in arrays.

Shape suffixes: N tokens of all examples, T turns of all examples, B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlx_afm.data.tokens import Weights
from mlx_afm.text.tokenizer import AFMTokenizer

ROLES = ("system", "user", "assistant", "tool", "text")
_NUMBER = {role: number for number, role in enumerate(ROLES)}
_ASSISTANT, _TEXT = _NUMBER["assistant"], _NUMBER["text"]

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of some examples, one after the other.

    Attributes:
        ids: int32 (N,).
        weights: loss weight of each id, see `Encoded`; bool (N,) if all are 0 or 1, else float32 (N,).
        starts: int64 (B + 1,), where each example starts; the last is N.
        roles: int64 (B, roles), tokens of the turns of each role of `ROLES`, marks included.
        odd: examples whose turns are not those that were rendered; `encode` says why.
    """

    ids: npt.NDArray[np.int32]
    weights: Weights
    starts: npt.NDArray[np.int64]
    roles: npt.NDArray[np.int64]
    odd: npt.NDArray[np.bool_]


def encode_block(
    texts: Sequence[str],
    roles: Sequence[tuple[str, ...]],
    tokenizer: AFMTokenizer,
    shared: str = "",
    weights: Mapping[int, tuple[float, ...]] = MappingProxyType({}),
) -> EncodedBlock:
    """The tokens of rendered examples, the same as `encode_spans` gives for each.

    Args:
        texts: each example, rendered.
        roles: whose its turns are; plain text has none.
        tokenizer: of the model.
        shared: what `SHARED`, with which a text may begin, stands for.
        weights: loss weight of each turn, for the examples in which an assistant's turn has another than 1.
    """
    turns_B = np.fromiter(map(len, roles), np.int64, len(roles))
    plain = turns_B == 0
    ids, starts = _ids(texts, plain, tokenizer, shared)
    roles_T = np.fromiter(chain.from_iterable(map(_numbers, roles)), np.int64, int(turns_B.sum()))
    role_T = np.repeat(np.arange(len(texts)) * len(ROLES), turns_B) + roles_T
    start_T, body_T, stop_T, odd = _turns(ids, starts, turns_B, tokenizer)
    tokens = np.zeros((len(texts), len(ROLES)), np.int64)
    tokens[plain, _TEXT] = np.diff(starts)[plain]
    if not odd.any():
        tokens += np.bincount(role_T, stop_T - start_T, tokens.size).astype(np.int64).reshape(tokens.shape)
        trained = _trained(len(ids), body_T[roles_T == _ASSISTANT], stop_T[roles_T == _ASSISTANT])
    else:  # the caller encodes those one by one
        trained = np.zeros(len(ids), np.bool_)
        odd[:] = True
    for index in np.flatnonzero(plain):
        trained[starts[index] + 1 : starts[index + 1]] = True
    if weights and not odd.any():
        return EncodedBlock(ids, _weighted(trained, weights, turns_B, body_T, stop_T), starts, tokens, odd)
    return EncodedBlock(ids, trained, starts, tokens, odd)


def _ids(
    texts: Sequence[str], plain: npt.NDArray[np.bool_], tokenizer: AFMTokenizer, shared: str
) -> tuple[npt.NDArray[np.int32], Places]:
    """The ids of all examples with their end-of-sequence tokens, and where each example starts."""
    ids, counts = tokenizer.encode_flat(texts, shared)
    starts = np.concatenate([[0], np.cumsum(counts)])
    ids[starts[:-1][~plain]] = tokenizer.eos_id  # in place of the lone space before the first mark
    if not plain.any():
        return ids, starts
    ids = np.insert(ids, np.concatenate([starts[:-1][plain], starts[1:][plain]]), tokenizer.eos_id)
    return ids, np.concatenate([[0], np.cumsum(counts + 2 * plain)])


@lru_cache(maxsize=1024)
def _numbers(roles: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(_NUMBER[role] for role in roles)


def _turns(
    ids: npt.NDArray[np.int32], starts: Places, turns_B: Places, tokenizer: AFMTokenizer
) -> tuple[Places, Places, Places, npt.NDArray[np.bool_]]:
    """Start, body and stop of each turn, and the examples in which they are not as rendered."""
    start_T = np.flatnonzero(ids == tokenizer.turn_start_id)
    stop_T = np.flatnonzero(ids == tokenizer.turn_end_id) + 1
    newlines = np.flatnonzero(ids == tokenizer.newline_id)
    counts = [np.diff(np.searchsorted(places, starts)) for places in (start_T, stop_T - 1)]
    odd = (counts[0] != turns_B) | (counts[1] != turns_B)
    if odd.any():
        return start_T, start_T, start_T, odd
    body_T = np.append(newlines, len(ids))[np.searchsorted(newlines, start_T)] + 1
    following = np.append(start_T[1:], len(ids))
    wrong = ~((start_T < body_T) & (body_T < stop_T) & (stop_T <= following))
    odd[np.repeat(np.arange(len(turns_B)), turns_B)[wrong]] = True
    return start_T, body_T, stop_T, odd


def _weighted(
    trained: npt.NDArray[np.bool_],
    weights: Mapping[int, tuple[float, ...]],
    turns_B: Places,
    body_T: Places,
    stop_T: Places,
) -> npt.NDArray[np.float32]:
    """Loss weights of all ids, float32 (N,): 1 where trained, but in the examples named by `weights` as it says."""
    weights_N = trained.astype(np.float32)
    first_B = np.cumsum(turns_B) - turns_B
    for example, weights_of_turns in weights.items():
        for turn, weight in enumerate(weights_of_turns, start=int(first_B[example])):
            weights_N[body_T[turn] : stop_T[turn]] = weight
    return weights_N


def _trained(count: int, bodies: Places, stops: Places) -> npt.NDArray[np.bool_]:
    edges = np.zeros(count + 1, np.int8)
    edges[bodies] = 1
    edges[stops] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)
