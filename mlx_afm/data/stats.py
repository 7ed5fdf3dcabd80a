"""What training data is made of: how much, how long, how much of it is trained, and what it wastes.

Lengths are those of the whole examples, whatever `--truncation` would make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.data.blocks import ROLES
from mlx_afm.data.config import DataConfig
from mlx_afm.data.plan import plan_batches
from mlx_afm.data.prepare import (
    LINE,
    ROLE_TOKENS,
    SYSTEM,
    TOKENS,
    TRAINED,
    Block,
    Prepared,
    examples_array,
    iter_blocks,
)
from mlx_afm.data.sources import Files
from mlx_afm.data.workers import prepare_all, to_tokenizer
from mlx_afm.errors import DataError
from mlx_afm.text.tokenizer import AFMTokenizer

BATCH_SIZE = 4
MAX_BINS = 16
LONGEST = 5  # lines that are named
NO_LIMIT = 2**62

Ints = npt.NDArray[np.int64]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bin:
    """How many examples have at least `low` and less than `high` tokens."""

    low: int
    high: int
    examples: int


@dataclass(frozen=True)
class Place:
    """An example and its length."""

    file: str
    line: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """A split in numbers.

    Attributes:
        examples: good ones, which alone are counted.
        faulty_lines: records that training would refuse for something else than their length.
        tokens: of all examples.
        trained_tokens: those the model learns to say.
        role_tokens: tokens of each role, the special tokens of its turns included; the end-of-sequence token in
            front of an example is nobody's.
        mean, median, percentile_95, longest: of the lengths.
        limit: the longest example allowed.
        longer: examples beyond it.
        histogram: of the lengths, without a gap.
        longest_examples: the longest first.
        batch_size: of the plan that is weighed here.
        padded_tokens: tokens of the rectangles that batches fill.
        shared_tokens: without padding, and each system prompt (with the end-of-sequence token in front)
            once a batch.
        system_mean, system_longest: tokens of the system turns.
    """

    examples: int
    faulty_lines: int
    tokens: int
    trained_tokens: int
    role_tokens: dict[str, int]
    mean: float
    median: int
    percentile_95: int
    longest: int
    limit: int
    longer: int
    histogram: tuple[Bin, ...]
    longest_examples: tuple[Place, ...]
    batch_size: int
    padded_tokens: int
    shared_tokens: int
    system_mean: float
    system_longest: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the shares that follow from the counts."""
        shares = {
            "trained_share": self.trained_tokens / self.tokens,
            "role_shares": {role: count / self.tokens for role, count in self.role_tokens.items()},
            "packed_saves": 1 - self.tokens / self.padded_tokens,
            "sharing_saves": 1 - self.shared_tokens / self.padded_tokens,
            "system_mean_share_of_limit": self.system_mean / self.limit,
            "system_longest_share_of_limit": self.system_longest / self.limit,
        }
        return {**asdict(self), **shares}


def measure_split(
    files: Files,
    tokenizer: AFMTokenizer | str | Path,
    config: DataConfig | None = None,
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> SplitStats:
    """A split in numbers.

    Args:
        files: from `find_splits`.
        tokenizer: the model's, or its `tokenizer.model`.
        config: how to read; only `max_tokens` of what it says about length matters.
        workers: processes, see `prepare_all`.
        on_progress: told of bytes read and in all.

    Raises:
        DataError: no good example at all. FormatError, ConfigError: see `read_tokens`.
    Cost: about 100 bytes an example.
    """
    config = config or DataConfig()
    unlimited = replace(config, max_tokens=NO_LIMIT, truncation="error")
    blocks = _told(iter_blocks(files), files, on_progress)
    parts = list(prepare_all(blocks, unlimited, to_tokenizer(tokenizer), want_tokens=False, workers=workers))
    examples = examples_array(parts)
    faulty = len({(part.file, p.line) for part in parts for p in part.problems if p.is_error})
    if not len(examples):
        found = f"{faulty} faulty line(s)" if faulty else "no records"
        advice = "mlx-afm data check says what is wrong with each line."
        raise DataError("no examples", kind="no-examples", where=files[0], found=found, advice=advice)
    lengths = examples[:, TOKENS]
    systems = examples[:, ROLE_TOKENS][:, ROLES.index("system")]
    padded, shared = _weigh_batches(lengths, systems, examples[:, SYSTEM])
    return SplitStats(
        examples=len(examples),
        faulty_lines=faulty,
        tokens=int(lengths.sum()),
        trained_tokens=int(examples[:, TRAINED].sum()),
        role_tokens=dict(zip(ROLES, examples[:, ROLE_TOKENS].sum(axis=0).tolist())),
        mean=float(lengths.mean()),
        median=_percentile(lengths, 50),
        percentile_95=_percentile(lengths, 95),
        longest=int(lengths.max()),
        limit=config.max_tokens,
        longer=int((lengths > config.max_tokens).sum()),
        histogram=histogram(lengths),
        longest_examples=_longest(parts, files),
        batch_size=BATCH_SIZE,
        padded_tokens=padded,
        shared_tokens=shared,
        system_mean=float(systems.mean()),
        system_longest=int(systems.max()),
    )


def histogram(lengths: Ints) -> tuple[Bin, ...]:
    """Bins of one round width (1, 2 or 5 times a power of ten) from 0 to the longest; at most 16."""
    longest = int(lengths.max())
    width = next(w for w in _round_numbers() if longest // w < MAX_BINS)
    counts = np.bincount(lengths // width)
    return tuple(Bin(place * width, (place + 1) * width, count) for place, count in enumerate(counts.tolist()))


def _round_numbers() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _percentile(lengths: Ints, percent: int) -> int:
    """The least length that so many percent do not exceed."""
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


def _longest(parts: Sequence[Prepared], files: Files) -> tuple[Place, ...]:
    places = [
        (-int(row[TOKENS]), part.file, int(row[LINE]))
        for part in parts
        for row in sorted(part.examples, key=lambda row: -row[TOKENS])[:LONGEST]
    ]
    return tuple(Place(str(files[file]), line, -tokens) for tokens, file, line in sorted(places)[:LONGEST])


def _weigh_batches(lengths: Ints, system_tokens: Ints, systems: Ints) -> tuple[int, int]:
    """Tokens of the padded batches of an epoch; and of the examples alone, each system prompt once a batch."""
    padded, repeated = 0, 0
    sizes, heads, kinds = lengths.tolist(), system_tokens.tolist(), systems.tolist()
    for batch in plan_batches(sizes, BATCH_SIZE, seed=0, epoch=0):
        padded += len(batch) * max(sizes[index] for index in batch)
        seen: set[int] = set()
        for index in batch:
            repeated += 1 + heads[index] if kinds[index] in seen else 0
            if kinds[index]:
                seen.add(kinds[index])
    return padded, sum(sizes) - repeated


def _told(blocks: Iterator[Block], files: Files, on_progress: OnProgress | None) -> Iterator[Block]:
    """The blocks, and how far they have come."""
    done, total = 0, sum(file.stat().st_size for file in files if file.is_file())
    for block in blocks:
        done += sum(len(row.text) + 1 for row in block.rows)
        if on_progress is not None:
            on_progress(min(done, total), total)
        yield block
