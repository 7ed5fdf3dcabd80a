"""Blocks of rows to arrays: everything that is done to each record, in whichever process it is done.

Training and `data check` both come through here, so that what one refuses the other reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_afm.data.config import DataConfig
from mlx_afm.data.encode import encode_spans, render_example
from mlx_afm.data.encode_block import ROLES, encode_block
from mlx_afm.data.overflow import fit
from mlx_afm.data.problems import Problem, to_problems
from mlx_afm.data.records import MARKS, Example, RecordReader
from mlx_afm.data.rows import Row
from mlx_afm.data.sources import Files, iter_rows
from mlx_afm.errors import DataError
from mlx_afm.text.template import NEWLINE, Encoded, Span
from mlx_afm.text.tokenizer import AFMTokenizer

BLOCK_BYTES = 1 << 19  # of JSON; small enough that a few of them in flight are little memory
BLOCK_ROWS = 4096
# Columns of `Prepared.examples`.
LINE, TOKENS, ROLE_TOKENS = 0, 1, slice(2, 2 + len(ROLES))
TRAINED, EXAMPLE, PROMPT, SYSTEM = (2 + len(ROLES) + place for place in range(4))
COLUMNS = SYSTEM + 1


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
    rows: list[Row]


@dataclass
class Prepared:
    """What became of a block.

    Attributes:
        file, name: of the block.
        rows: how many there were.
        problems: what is wrong with them.
        examples: int64 (examples, columns): of each good example line, tokens, tokens of each role of `ROLES` (marks
            included), trained tokens, fingerprints of the example, of its prompt (without the last answer)
            and of its system turn (0 if there is none); no fingerprints where the tokens are wanted.
        ids, trained: the tokens of all good examples, one after the other; empty if not wanted.
        lost: (line, tokens removed, whether it was left out) of each example that overflow changed.
    """

    file: int
    name: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    examples: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, COLUMNS), np.int64))
    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    trained: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    lost: list[tuple[int, int, bool]] = field(default_factory=list)


def iter_blocks(files: Files, first_index: int = 0) -> Iterator[Block]:
    """The rows of a split in blocks, one file after the other; the first row has the number given."""
    index = first_index
    for number, path in enumerate(files):
        rows: list[Row] = []
        size = 0
        for row in iter_rows(path):
            rows.append(row)
            size += len(row.text)
            if size >= BLOCK_BYTES or len(rows) >= BLOCK_ROWS:
                yield Block(number, str(path), index, rows)
                index, rows, size = index + len(rows), [], 0
        if rows:
            yield Block(number, str(path), index, rows)
            index += len(rows)


class Preparer:
    """Does the work on a block."""

    def __init__(self, config: DataConfig, tokenizer: AFMTokenizer | None, *, want_tokens: bool) -> None:
        """Without a tokenizer nothing is encoded: no lengths, no tokens, no overflow."""
        self.config, self.tokenizer, self.want_tokens = config, tokenizer, want_tokens
        self.read = RecordReader(config, MARKS if tokenizer is None else tokenizer.special_pieces)

    def __call__(self, block: Block) -> Prepared:
        """What became of the block; nothing is raised for what its rows hold."""
        prepared = Prepared(block.file, block.name, len(block.rows))
        lines, rendered = self._rendered(block, prepared)
        if self.tokenizer is None:
            self._fill(prepared, lines, rendered, np.zeros((len(lines), 2 + len(ROLES)), np.int64))
            return prepared
        encoded = encode_block(rendered, self.tokenizer)
        lengths = np.diff(encoded.starts)
        closer = encoded.odd | (lengths > self.config.max_tokens)
        if closer.any():
            self._one_by_one(prepared, lines, rendered)
            return prepared
        targets = np.diff(np.concatenate([[0], np.cumsum(encoded.trained)])[encoded.starts])
        self._fill(prepared, lines, rendered, np.column_stack([lengths, encoded.roles, targets]))
        if self.want_tokens:
            prepared.ids, prepared.trained = encoded.ids, encoded.trained
        return prepared

    def _rendered(self, block: Block, prepared: Prepared) -> tuple[list[int], list[tuple[Span, ...]]]:
        """Lines and spans of the good rows; what is wrong with the others goes to `prepared`."""
        lines, rendered = [], []
        name = Path(block.name).name
        for index, row in enumerate(block.rows, start=block.first_index):
            try:
                example = self.read(row, index, f"{name} line {row.line}")
                rendered.append(render_example(example, self.config.system))
            except DataError as error:
                prepared.problems += to_problems(error, block.name, row.line)
                continue
            lines.append(row.line)
            prepared.problems += _warnings(example, row, prepared.name)
        return lines, rendered

    def _one_by_one(self, prepared: Prepared, lines: list[int], rendered: list[tuple[Span, ...]]) -> None:
        """The same for a block with examples that are too long, or whose turns are not as rendered."""
        assert self.tokenizer is not None
        kept: list[tuple[int, tuple[Span, ...], Encoded]] = []
        counts = []
        for line, spans in zip(lines, rendered):
            try:
                whole = encode_spans(spans, self.tokenizer)
                fitted = fit(whole, self.config.max_tokens, self.config.overflow)
            except DataError as error:
                prepared.problems += to_problems(error, prepared.name, line)
                continue
            if fitted.removed_tokens:
                prepared.lost.append((line, fitted.removed_tokens, fitted.encoded is None))
            if fitted.encoded is not None:
                kept.append((line, spans, fitted.encoded))
                counts.append((len(fitted.encoded.ids), *_tokens_of_roles(whole), sum(fitted.encoded.trained)))
        rows = np.array(counts, np.int64).reshape(len(counts), 2 + len(ROLES))
        self._fill(prepared, [line for line, _, _ in kept], [spans for _, spans, _ in kept], rows)
        if self.want_tokens:
            prepared.ids = np.array([token for _, _, encoded in kept for token in encoded.ids], np.int32)
            prepared.trained = np.array([one for _, _, encoded in kept for one in encoded.trained], np.bool_)

    def _fill(
        self, prepared: Prepared, lines: list[int], rendered: list[tuple[Span, ...]], counts: npt.NDArray[np.int64]
    ) -> None:
        """Fills `prepared.examples`; fingerprints only where nobody wants the tokens themselves."""
        prints = [(0, 0, 0)] * len(lines) if self.want_tokens else [_fingerprints(spans) for spans in rendered]
        columns = (np.array(lines, np.int64), counts, np.array(prints, np.int64).reshape(len(lines), 3))
        prepared.examples = np.column_stack(columns)


def _tokens_of_roles(encoded: Encoded) -> list[int]:
    roles = [0] * len(ROLES)
    for turn in encoded.turns:
        roles[ROLES.index(turn.role)] += turn.stop - turn.start
    roles[ROLES.index("text")] += 0 if encoded.turns else len(encoded.ids)
    return roles


def _fingerprints(spans: Sequence[Span]) -> tuple[int, int, int]:
    """64 bits each of the whole example, of what comes before its last answer, and of its system turn."""
    texts = [span.text for span in spans]
    system = _system_hash(texts[1]) if spans[0].role == "system" else 0
    prompt = blake2b("".join(texts[:-1]).encode("utf-8", "surrogatepass"), digest_size=8)
    example = prompt.copy()
    example.update(texts[-1].encode("utf-8", "surrogatepass"))
    return _number(example.digest()), _number(prompt.digest()), system


@lru_cache(maxsize=64)
def _system_hash(text: str) -> int:
    return _number(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


_NEWLINE, _REPLACEMENT = NEWLINE.encode(), "\ufffd".encode()


def _warnings(example: Example, row: Row, file: str) -> Iterator[Problem]:
    """What is odd about a good example."""
    if _NEWLINE in row.text:
        message = f"a text spells {NEWLINE!r}, which the model reads as a newline"
        yield Problem(file, row.line, "newline-mark", message, _column(row.text, NEWLINE))
    if _REPLACEMENT in row.text or (b"\\u" in row.text and b"\\ufffd" in row.text.lower()):
        message = "a text holds the replacement character U+FFFD: something was lost where the data was made"
        yield Problem(file, row.line, "replacement-character", message, _column(row.text, "\ufffd"))
    for index, message_ in enumerate(example.messages):
        if message_.role == "user" and not str(message_.content).strip():
            yield Problem(file, row.line, "empty-prompt", f"message {index}: an empty request")


def _column(text: bytes, piece: str) -> int | None:
    place = text.decode("utf-8").find(piece)
    return None if place < 0 else place + 1


def examples_array(prepared: Iterable[Prepared]) -> npt.NDArray[np.int64]:
    """The `examples` of some blocks, int64 (examples, columns)."""
    return np.concatenate([np.zeros((0, COLUMNS), np.int64), *(part.examples for part in prepared)])
