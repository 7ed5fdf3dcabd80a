"""Many rendered examples to tokens at once: what `encode` does for one, in arrays.

Shape suffixes: N tokens of all examples, T turns of all examples, B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

from mlx_afm.text.template import Span
from mlx_afm.text.tokenizer import AFMTokenizer

ROLES = ("system", "user", "assistant", "tool", "text")
_NUMBER = {role: number for number, role in enumerate(ROLES)}
_ASSISTANT, _TEXT = _NUMBER["assistant"], _NUMBER["text"]


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of some examples, one after the other.

    Attributes:
        ids: int32 (N,).
        trained: bool (N,), see `Encoded`.
        starts: int64 (B + 1,), where each example starts; the last is N.
        roles: int64 (B, roles), tokens of the turns of each role of `ROLES`, marks included.
        odd: examples whose turns are not those that were rendered; `encode` says why.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    roles: npt.NDArray[np.int64]
    odd: npt.NDArray[np.bool_]


def encode_block(rendered: Sequence[Sequence[Span]], tokenizer: AFMTokenizer) -> EncodedBlock:
    """The tokens of rendered examples, the same as `encode_spans` gives for each.

    The system turn, the same in most examples, is encoded once: its end and the next turn's start are
    marks, across which no piece reaches.
    """
    pieces = _ids(rendered, tokenizer)
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter(chain.from_iterable(pieces), np.int32, int(starts[-1]))
    roles_T = np.array([_NUMBER[span.role] for spans in rendered for span in spans[1::2]], np.int64)
    turns_B = np.fromiter((len(spans) // 2 for spans in rendered), np.int64, len(rendered))
    example_T = np.repeat(np.arange(len(rendered)), turns_B)
    start_T, body_T, stop_T, odd = _turns(ids, starts, turns_B, tokenizer)
    roles = np.zeros((len(rendered), len(ROLES)), np.int64)
    plain = turns_B == 0
    roles[plain, _TEXT] = lengths[plain]
    if not odd.any():
        np.add.at(roles, (example_T, roles_T), stop_T - start_T)
        trained = _trained(len(ids), body_T[roles_T == _ASSISTANT], stop_T[roles_T == _ASSISTANT])
    else:  # the caller encodes those one by one
        trained = np.zeros(len(ids), np.bool_)
        odd[:] = True
    for index in np.flatnonzero(plain):
        trained[starts[index] + 1 : starts[index + 1]] = True
    return EncodedBlock(ids, trained, starts, roles, odd)


def _ids(rendered: Sequence[Sequence[Span]], tokenizer: AFMTokenizer) -> list[list[int]]:
    heads = [
        _system_ids(spans[0].text + spans[1].text, tokenizer) if _has_system(spans) else None for spans in rendered
    ]
    texts = [
        "".join([span.text for span in (spans if head is None else spans[2:])]) for spans, head in zip(rendered, heads)
    ]
    encoded = tokenizer.encode_many(texts)
    eos = tokenizer.eos_id
    for spans, head, ids in zip(rendered, heads, encoded):
        if head is not None:
            ids[:1] = head
        elif spans[0].role == "text":
            ids[:0] = [eos]
            ids.append(eos)
        else:
            ids[0] = eos
    return encoded


def _has_system(spans: Sequence[Span]) -> bool:
    return len(spans) > 2 and spans[0].role == "system"


@lru_cache(maxsize=256)
def _system_ids(text: str, tokenizer: AFMTokenizer) -> list[int]:
    """The end-of-sequence token, and the system turn."""
    return [tokenizer.eos_id, *tokenizer.encode(text)[1:]]


Places = npt.NDArray[np.int64]


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
    np.logical_or.at(odd, np.repeat(np.arange(len(turns_B)), turns_B), wrong)
    return start_T, body_T, stop_T, odd


def _trained(count: int, bodies: Places, stops: Places) -> npt.NDArray[np.bool_]:
    edges = np.zeros(count + 1, np.int8)
    edges[bodies] = 1
    edges[stops] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)
