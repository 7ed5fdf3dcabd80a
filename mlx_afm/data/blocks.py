"""Blocks of rows to rendered texts to tokens: many examples at once, in arrays.

Plain lines are read at once, all others one by one, with what is wrong with them. What
`encode` does for one example is done here for many.

Shape suffixes: N tokens of all examples, T turns of all examples, B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlx_afm.data.batches import Weights
from mlx_afm.data.config import DataConfig
from mlx_afm.data.oddities import iter_oddities
from mlx_afm.data.plain import PlainLines, PlainReader
from mlx_afm.data.records import RecordReader, render_example
from mlx_afm.data.report import Problem, to_problems
from mlx_afm.data.rows import DataRow
from mlx_afm.errors import DataError
from mlx_afm.text.template import Span
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.words import SHARED


@dataclass(frozen=True)
class Block:
    """Some rows of one file.

    Attributes:
        file: index of the file among those of the split.
        name: the file as the caller named it.
        first_index: number of the first row in the split, counted from 0.
        rows: the rows.
    """

    file: int
    name: str
    first_index: int
    rows: list[DataRow]


@dataclass
class RenderedBlock:
    """The good rows of a block.

    Attributes:
        rows: the rows.
        texts: each row's example, rendered; `SHARED`, with which it may begin, stands for `shared`.
        roles: whose the turns are; plain text has none.
        shared: what many of the texts begin with.
        spans: those of the rows that were read one by one, by their place in `rows`.
        weights: loss weight of each turn, for the rows in which an assistant's turn has another than 1.
        problems: what is wrong with the other rows, and what is odd about these.
    """

    rows: list[DataRow] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    roles: list[tuple[str, ...]] = field(default_factory=list)
    shared: str = ""
    spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    weights: dict[int, tuple[float, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add_plain(self, rows: list[DataRow], plain: PlainLines, start: int, stop: int) -> None:
        """A stretch of plain rows."""
        self.rows += rows[start:stop]
        self.texts += plain.texts[start:stop]
        self.roles += plain.roles[start:stop]  # type: ignore[arg-type]

    def add(self, row: DataRow, text: str, roles: tuple[str, ...]) -> None:
        """One more row."""
        self.rows.append(row)
        self.texts.append(text)
        self.roles.append(roles)

    def whole_text(self, place: int) -> str:
        """A text without `SHARED`."""
        text = self.texts[place]
        return self.shared + text[1:] if self.shared and text[:1] == SHARED else text


class BlockRenderer:
    """Renders blocks, by the rules of a `DataConfig`."""

    def __init__(self, config: DataConfig, special_pieces: Sequence[str]) -> None:
        """Takes what `RecordReader` does.

        Raises:
            ConfigError: there is no such transform.
        """
        self._system = config.system
        self._read, self._plain = RecordReader(config, special_pieces), PlainReader(config, special_pieces)

    def __call__(self, block: Block) -> RenderedBlock:
        """The good rows of a block; nothing is raised for what the others hold."""
        plain = self._plain(block.rows)
        rendered = RenderedBlock(shared="" if plain is None else plain.shared)
        done = 0
        for place, row in enumerate(block.rows):
            if plain is not None and plain.roles[place] is not None:
                continue
            if plain is not None:
                rendered.add_plain(block.rows, plain, done, place)
            done = place + 1
            self._add_read(rendered, row, block, place)
        if plain is not None:
            rendered.add_plain(block.rows, plain, done, len(block.rows))
        # Only a plain text can begin with the special token itself; then it stands for nothing in this block.
        if rendered.shared and any(rendered.texts[place][:1] == SHARED for place in rendered.spans):
            places = range(len(rendered.texts))
            rendered.texts = [rendered.texts[p] if p in rendered.spans else rendered.whole_text(p) for p in places]
            rendered.shared = ""
        return rendered

    def spans(self, rendered: RenderedBlock, place: int) -> tuple[Span, ...]:
        """The spans of a good row."""
        if place in rendered.spans:
            return rendered.spans[place]
        return render_example(self._read(rendered.rows[place], 0, ""), self._system)  # a plain row has no transform

    def _add_read(self, rendered: RenderedBlock, row: DataRow, block: Block, place: int) -> None:
        where = f"{_base_name(block.name)} line {row.line}"
        try:
            example = self._read(row, block.first_index + place, where)
            spans = render_example(example, self._system)
        except DataError as error:
            rendered.problems += to_problems(error, block.name, row.line)
            return
        text = "".join([span.text for span in spans])
        rendered.problems += iter_oddities(example, text, row, block.name)
        if any(message.weight is not None for message in example.messages):
            rendered.weights[len(rendered.rows)] = tuple([span.weight for span in spans[1::2]])
        rendered.spans[len(rendered.rows)] = spans
        rendered.add(row, text, tuple([span.role for span in spans[1::2]]))


@lru_cache(maxsize=8)
def _base_name(path: str) -> str:
    return Path(path).name


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
        roles: int64 (B, roles), tokens of the turns of each role of `ROLES`, special tokens included.
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
    ids[starts[:-1][~plain]] = tokenizer.eos_id  # in place of the lone space before the first special token
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
