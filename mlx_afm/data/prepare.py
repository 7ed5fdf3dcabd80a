"""Blocks of rows to arrays: everything that is done to each record, in whichever process it is done.

Training and `data check` both come through here, so that what one refuses the other reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from mlx_afm.data.batches import Weights
from mlx_afm.data.blocks import ROLES, BlockRenderer, RenderedBlock, encode_block
from mlx_afm.data.blocks import Block as Block
from mlx_afm.data.config import DataConfig
from mlx_afm.data.oddities import unknown_tokens
from mlx_afm.data.records import encode_spans
from mlx_afm.data.report import Problem, to_problems
from mlx_afm.data.rows import DataRow
from mlx_afm.data.sources import Files, iter_rows
from mlx_afm.data.truncation import fit
from mlx_afm.errors import DataError
from mlx_afm.text.template import NEWLINE, SPECIAL_TOKENS, TURN_END, TURN_START, Encoded
from mlx_afm.text.tokenizer import AFMTokenizer

BLOCK_BYTES = 1 << 19  # of JSON; small enough that a few of them in flight are little memory
BLOCK_ROWS = 4096
# Columns of `Prepared.examples`.
LINE, TOKENS, ROLE_TOKENS = 0, 1, slice(2, 2 + len(ROLES))
TRAINED, EXAMPLE, PROMPT, SYSTEM = (2 + len(ROLES) + place for place in range(4))
COLUMNS = SYSTEM + 1


@dataclass
class Prepared:
    """What became of a block.

    Attributes:
        file, name: of the block.
        rows: how many there were.
        problems: what is wrong with them.
        examples: int64 (examples, columns): of each good example line, tokens, tokens of each role of `ROLES` (special
            tokens included), trained tokens, fingerprints of the example, of its prompt (without the last answer)
            and of its system turn (0 if there is none); no fingerprints where the tokens are wanted.
        ids, weights: the tokens of all good examples and their loss weights, see `TokenTable`; empty if not wanted.
        lost: (line, tokens removed, whether it was left out) of each example that truncation changed.
    """

    file: int
    name: str
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    examples: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, COLUMNS), np.int64))
    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    weights: Weights = field(default_factory=lambda: np.zeros(0, np.bool_))
    lost: list[tuple[int, int, bool]] = field(default_factory=list)


def iter_blocks(files: Files, first_index: int = 0) -> Iterator[Block]:
    """The rows of a split in blocks, one file after the other; the first row has the number given."""
    index = first_index
    for number, path in enumerate(files):
        rows: list[DataRow] = []
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
        """Without a tokenizer nothing is encoded: no lengths, no tokens, no truncation."""
        self.config, self.tokenizer, self.want_tokens = config, tokenizer, want_tokens
        self.render = BlockRenderer(config, SPECIAL_TOKENS if tokenizer is None else tokenizer.special_pieces)

    def __call__(self, block: Block) -> Prepared:
        """What became of the block; nothing is raised for what its rows hold."""
        rendered = self.render(block)
        prepared = Prepared(block.file, block.name, len(block.rows), rendered.problems)
        places = range(len(rendered.rows))
        if self.tokenizer is None:
            self._fill(prepared, rendered, places, np.zeros((len(places), 2 + len(ROLES)), np.int64))
            return prepared
        encoded = encode_block(rendered.texts, rendered.roles, self.tokenizer, rendered.shared, rendered.weights)
        lengths = np.diff(encoded.starts)
        closer = encoded.odd | (lengths > self.config.max_tokens)
        if closer.any():
            self._one_by_one(prepared, rendered)
            return prepared
        targets = np.diff(np.concatenate([[0], np.cumsum(encoded.weights > 0)])[encoded.starts])
        if not self.want_tokens:
            unknown = np.cumsum(np.concatenate([[0], encoded.ids == self.tokenizer.unk_id]))[encoded.starts]
            self._warn_of_unknown(prepared, rendered, np.flatnonzero(np.diff(unknown)).tolist())
        self._fill(prepared, rendered, places, np.column_stack([lengths, encoded.roles, targets]))
        if self.want_tokens:
            prepared.ids, prepared.weights = encoded.ids, encoded.weights
        return prepared

    def _one_by_one(self, prepared: Prepared, rendered: RenderedBlock) -> None:
        """The same for a block with examples that are too long, or whose turns are not as rendered."""
        assert self.tokenizer is not None
        kept: list[int] = []
        parts: list[Encoded] = []
        counts = []
        for place, row in enumerate(rendered.rows):
            try:
                whole = encode_spans(self.render.spans(rendered, place), self.tokenizer)
                fitted = fit(whole, self.config.max_tokens, self.config.truncation)
            except DataError as error:
                prepared.problems += to_problems(error, prepared.name, row.line)
                continue
            if fitted.removed_tokens:
                prepared.lost.append((row.line, fitted.removed_tokens, fitted.encoded is None))
            if fitted.encoded is not None:
                kept.append(place)
                parts.append(fitted.encoded)
                counts.append((len(fitted.encoded.ids), *_tokens_of_roles(whole), sum(fitted.encoded.trained)))
        if not self.want_tokens:
            unknown = [place for place, part in zip(kept, parts) if self.tokenizer.unk_id in part.ids]
            self._warn_of_unknown(prepared, rendered, unknown)
        self._fill(prepared, rendered, kept, np.array(counts, np.int64).reshape(len(counts), 2 + len(ROLES)))
        if self.want_tokens:
            prepared.ids = np.array([token for part in parts for token in part.ids], np.int32)
            weights = np.array([one for part in parts for one in part.weights], np.float32)
            prepared.weights = weights if rendered.weights else weights > 0

    def _warn_of_unknown(self, prepared: Prepared, rendered: RenderedBlock, places: Sequence[int]) -> None:
        """Adds a warning for each of these rows, whose tokens have unknown ones among them."""
        assert self.tokenizer is not None
        for place in places:
            row = rendered.rows[place]
            prepared.problems.append(unknown_tokens(rendered.whole_text(place), self.tokenizer, row, prepared.name))

    def _fill(
        self, prepared: Prepared, rendered: RenderedBlock, places: Sequence[int], counts: npt.NDArray[np.int64]
    ) -> None:
        """Fills `prepared.examples`; fingerprints only where nobody wants the tokens themselves."""
        lines = np.array([rendered.rows[place].line for place in places], np.int64)
        prints = np.zeros((len(places), 3), np.int64)
        if places and not self.want_tokens:
            prints[:] = [_fingerprints(rendered, place) for place in places]
        prepared.examples = np.column_stack([lines, counts, prints])


def _tokens_of_roles(encoded: Encoded) -> list[int]:
    roles = [0] * len(ROLES)
    for turn in encoded.turns:
        roles[ROLES.index(turn.role)] += turn.stop - turn.start
    roles[ROLES.index("text")] += 0 if encoded.turns else len(encoded.ids)
    return roles


def _fingerprints(rendered: RenderedBlock, place: int) -> tuple[int, int, int]:
    """64 bits each of the whole example, of what comes before its last answer, and of its system turn.

    Weights do not count: a held-out example is one, however much the same text is trained.
    """
    text, roles = rendered.whole_text(place), rendered.roles[place]
    head = f"{TURN_START} {roles[-1]}{NEWLINE}" if roles else ""
    answer = text.rfind(head) + len(head) if roles else 0
    has_system = roles[:1] == ("system",)
    system = _system_hash(text[: text.find(TURN_END)]) if has_system else 0
    prompt = blake2b(text[:answer].encode("utf-8", "surrogatepass"), digest_size=8)
    example = prompt.copy()
    example.update(text[answer:].encode("utf-8", "surrogatepass"))
    return _number(example.digest()), _number(prompt.digest()), system


@lru_cache(maxsize=64)
def _system_hash(text: str) -> int:
    return _number(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


def examples_array(prepared: Iterable[Prepared]) -> npt.NDArray[np.int64]:
    """The `examples` of some blocks, int64 (examples, columns)."""
    return np.concatenate([np.zeros((0, COLUMNS), np.int64), *(part.examples for part in prepared)])
