"""Blocks of rows to rendered texts: plain lines at once, all others one by one, with what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mlx_afm.data.config import DataConfig
from mlx_afm.data.encode import render_example
from mlx_afm.data.oddities import iter_oddities
from mlx_afm.data.plain import PlainLines, PlainReader
from mlx_afm.data.problems import Problem, to_problems
from mlx_afm.data.records import RecordReader
from mlx_afm.data.rows import DataRow
from mlx_afm.errors import DataError
from mlx_afm.text.template import Span
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
        # Only a plain text can begin with the mark itself; then it stands for nothing in this block.
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
