"""Some examples as the model sees them: token by token, and which of them it learns to say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_afm.data.config import DataConfig
from mlx_afm.data.records import RecordReader, encode_example
from mlx_afm.data.report import to_problems
from mlx_afm.data.rows import DataRow
from mlx_afm.data.sources import Files, iter_rows
from mlx_afm.data.truncation import fit
from mlx_afm.errors import DataError, SettingError
from mlx_afm.text.template import Encoded
from mlx_afm.text.tokenizer import AFMTokenizer


@dataclass(frozen=True)
class ExampleChoice:
    """Which examples: the one of `line`; else `count` of them, random with a seed, the first without."""

    count: int = 3
    seed: int | None = None
    line: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SettingError("nothing to show", expected="at least 1 example", found=self.count)
        if self.line is not None and self.line < 1:
            raise SettingError("line out of range", expected="at least 1", found=self.line)
        if self.seed is not None and self.seed < 0:
            raise SettingError("seed out of range", expected="at least 0", found=self.seed)
        if self.line is not None and self.seed is not None:
            raise SettingError("a line and a seed are two ways to choose", advice="Give one of them.")


@dataclass(frozen=True)
class Token:
    """One token, and whether it is trained."""

    id: int
    piece: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """An example as the model sees it.

    Attributes:
        file, line: where it stands.
        data_format: the form it is in.
        tokens: what is left of it after truncation.
        texts: the text of each run of tokens that are trained, or are not.
        removed_tokens: what truncation took away; all of it if there are no tokens.
    """

    file: str
    line: int
    data_format: str
    tokens: tuple[Token, ...]
    texts: tuple[tuple[str, bool], ...]
    removed_tokens: int

    def to_dict(self, with_ids: bool) -> dict[str, Any]:
        """As JSON."""
        values = {
            "file": self.file,
            "line": self.line,
            "data_format": self.data_format,
            "tokens": len(self.tokens),
            "trained_tokens": sum(token.trained for token in self.tokens),
            "removed_tokens": self.removed_tokens,
            "texts": [{"text": text, "trained": trained} for text, trained in self.texts],
        }
        return values | ({"ids": [vars(token) for token in self.tokens]} if with_ids else {})


def sample_examples(
    files: Files, tokenizer: AFMTokenizer, choice: ExampleChoice | None = None, config: DataConfig | None = None
) -> list[Sample]:
    """The chosen examples of a split, in the order of the files.

    Raises:
        DataError: no such line, no examples, or one of those chosen is faulty.
        FormatError, ConfigError: see `read_tokens`.
    Cost: random ones read all files once, without parsing their records.
    """
    config, choice = config or DataConfig(), choice or ExampleChoice()
    read = RecordReader(config, tokenizer.special_pieces)
    chosen = [*_choose(_numbered(files), choice)]
    if not chosen:
        what = "no examples" if choice.line is None else f"no example in line {choice.line}"
        raise DataError(what, kind="no-examples", where=files[0], advice="Blank lines hold none.")
    samples = []
    for index, path, row in chosen:
        try:
            example = read(row, index, f"{path.name} line {row.line}")
            fitted = fit(encode_example(example, tokenizer, config.system), config.max_tokens, config.truncation)
        except DataError as error:
            details = [str(problem) for problem in to_problems(error, str(path), row.line)]
            raise DataError("a faulty example", where=path, kind=error.kind, details=details) from error
        encoded = fitted.encoded or Encoded([], [])
        tokens = _tokens(encoded, tokenizer)
        texts = tuple(_texts(encoded, tokenizer))
        samples.append(Sample(str(path), row.line, example.data_format, tokens, texts, fitted.removed_tokens))
    return samples


def _numbered(files: Files) -> Iterator[tuple[int, Path, DataRow]]:
    rows = ((path, row) for path in files for row in iter_rows(path))
    return ((index, path, row) for index, (path, row) in enumerate(rows))


def _choose(rows: Iterable[tuple[int, Path, DataRow]], choice: ExampleChoice) -> Iterable[tuple[int, Path, DataRow]]:
    if choice.line is not None:
        return islice((item for item in rows if item[2].line == choice.line), 1)
    if choice.seed is None:
        return islice(rows, choice.count)
    kept: list[tuple[int, Path, DataRow]] = []  # each of the rows so far is in it with the same chance
    rng = np.random.default_rng(choice.seed)
    for item in rows:
        place = len(kept) if len(kept) < choice.count else int(rng.integers(item[0] + 1))
        kept[place : place + 1] = [item] if place < choice.count else []
    return sorted(kept, key=lambda item: item[0])


def _tokens(encoded: Encoded, tokenizer: AFMTokenizer) -> tuple[Token, ...]:
    pieces = tokenizer.convert_ids_to_tokens(encoded.ids)
    return tuple(Token(*facts) for facts in zip(encoded.ids, pieces, encoded.trained, strict=True))


def _texts(encoded: Encoded, tokenizer: AFMTokenizer) -> Iterator[tuple[str, bool]]:
    """The text of each run; the end-of-sequence token, which has none, as its piece."""
    end = tokenizer.convert_ids_to_tokens(tokenizer.eos_id)
    for trained, run in groupby(zip(encoded.ids, encoded.trained), key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        parts = [list(part) for _, part in groupby(ids, key=lambda token: token == tokenizer.eos_id)]
        yield "".join(end * len(p) if p[0] == tokenizer.eos_id else tokenizer.decode(p) for p in parts), trained
