"""One file of examples to train, valid and test, without a prompt on both sides.

Examples whose prompts are nearly the same (`near_duplicates`) are a group, and a group goes to one side as a
whole. Their lines are written as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlx_afm.data.config import DataConfig
from mlx_afm.data.near_duplicates import THRESHOLD, group_near, normalise
from mlx_afm.data.records import Example, RecordReader, as_json_line
from mlx_afm.data.report import Problem, to_problems
from mlx_afm.data.rows import DataRow
from mlx_afm.data.sources import SPLITS, Files, iter_rows
from mlx_afm.errors import ConfigError, DataError, SettingError
from mlx_afm.files import atomic_file
from mlx_afm.tree import shorten

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How to split.

    Attributes:
        valid, test: shares of the examples; 0 leaves a side out.
        seed: decides which groups go where; the groups themselves do not depend on it.
        threshold: share of two prompts' shingles from which on they are near; 1 groups equal prompts alone.
    """

    valid: float = 0.05
    test: float = 0.05
    seed: int = 0
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        faults = [f"{name}: expected 0 to 1, found {value}" for name, value in self.shares if not 0 <= value < 1]
        if not 0 < self.valid + self.test < 1:
            faults.append(f"valid and test together: expected between 0 and 1, found {self.valid + self.test:g}")
        if not 0 < self.threshold <= 1:
            faults.append(f"threshold: expected above 0, at most 1, found {self.threshold}")
        if self.seed < 0:
            faults.append(f"seed: expected at least 0, found {self.seed}")
        if faults:
            raise SettingError("settings of the split out of range", details=faults)

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """Share of each held-out side."""
        return ("valid", self.valid), ("test", self.test)

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the splits that are written."""
        return ("train", *(name for name, share in self.shares if share > 0))


@dataclass(frozen=True)
class DataSplit:
    """What was written.

    Attributes:
        files: path of each side.
        examples: number on each side.
        groups: of near prompts, alone ones included.
        largest_group: examples in it.
    """

    files: dict[str, str]
    examples: dict[str, int]
    groups: int
    largest_group: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def split_data(
    files: Files, folder: Path, config: SplitConfig | None = None, data_config: DataConfig | None = None
) -> DataSplit:
    """Writes `train.jsonl` and, by their shares, `valid.jsonl` and `test.jsonl`.

    Lines of JSON lines keep their bytes; records of other forms become JSON. The order of the lines
    stays. The same files, settings and seed give the same split.

    Args:
        files: one split, from `find_splits`.
        folder: for the results; files of these names are replaced.
        config: how to split.
        data_config: how to find the prompts.

    Raises:
        DataError: faulty records, all of them; or too few groups. Nothing was written.
        ConfigError: a result would replace a source. FormatError: see `iter_rows`.
    Cost: the files are read twice; memory see `group_near`.
    """
    config = config or SplitConfig()
    names = config.sides
    targets = {name: folder / f"{name}.jsonl" for name in names}
    require_other_files(files, targets.values())
    data_config = data_config or DataConfig()
    prompts = [_prompt(example) for example in _examples(files, data_config)]
    groups = group_examples(prompts, config.threshold)
    sides = assign(groups, config, where=files[0])
    with ExitStack() as stack:
        partial = {name: stack.enter_context(atomic_file(path)) for name, path in targets.items()}
        handles = {name: stack.enter_context(path.open("wb")) for name, path in partial.items()}
        _write(files, sides, handles, data_config.fields)
        for handle in handles.values():
            handle.close()
    sizes = np.bincount(groups)
    counts = {name: int((sides == SPLITS.index(name)).sum()) for name in names}
    return DataSplit(
        {name: str(path) for name, path in targets.items()}, counts, int((sizes > 0).sum()), int(sizes.max())
    )


def require_other_files(sources: Files, targets: Iterable[Path]) -> None:
    """Raises ConfigError if a result would replace what it is made of."""
    known = {source.resolve() for source in sources}
    if both := [target for target in targets if target.resolve() in known]:
        raise ConfigError("the result would replace its source", where=both[0], advice="Choose another folder or name.")


def group_examples(prompts: Sequence[str], threshold: float = THRESHOLD) -> Ints:
    """The group of each prompt, by its number."""
    normal: dict[str, int] = {}
    numbers = np.array([normal.setdefault(normalise(prompt), len(normal)) for prompt in prompts], np.int64)
    return group_near(list(normal), threshold)[numbers]


def assign(groups: Ints, config: SplitConfig, *, where: object) -> Ints:
    """The side of each example, an index into `SPLITS`; whole groups, in random order, as long as they fit.

    Each held-out side is at most as large as asked for, and smaller by less than any group left over.

    Raises:
        DataError: a side would be empty.
    """
    present, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(config.seed).permutation(len(present))
    side_of = np.zeros(len(present), np.int64)
    for name, share in config.shares:
        room = max(1, round(share * len(groups))) if share > 0 else 0
        for group in order.tolist():
            if side_of[group] == 0 and sizes[group] <= room:
                side_of[group] = SPLITS.index(name)
                room -= int(sizes[group])
    sides = side_of[np.searchsorted(present, groups)]
    if empty := [name for name in config.sides if not (sides == SPLITS.index(name)).any()]:
        found = f"{len(groups):,} examples in {len(present):,} groups of near prompts, the largest of {sizes.max():,}"
        advice = "Choose larger shares, or a higher threshold"
        raise DataError(f"too few groups: {empty[0]} would be empty", where=where, found=found, advice=advice)
    return sides


def _prompt(example: Example) -> str:
    """What is asked: every text before the last answer but the system's, which many examples have in common."""
    if example.text is not None:
        return example.text
    return "\n".join(str(message.content) for message in example.messages[:-1] if message.role != "system")


def _examples(files: Files, data_config: DataConfig) -> Iterator[Example]:
    read, problems, index = RecordReader(data_config), list[Problem](), 0
    for path, row in _rows(files):
        try:
            yield read(row, index, f"{path.name} line {row.line}")
        except DataError as error:
            problems += to_problems(error, str(path), row.line)
        index += 1
    if problems or not index:
        advice = "Nothing was written; mlx-afm data check --fix writes a copy without them." if problems else None
        what = f"{len({(p.file, p.line) for p in problems})} faulty line(s)" if problems else "no examples"
        kind = "faulty-lines" if problems else "no-examples"
        raise DataError(what, kind=kind, where=files[0], advice=advice, details=shorten(map(str, problems)))


def _rows(files: Files) -> Iterator[tuple[Path, DataRow]]:
    return ((path, row) for path in files for row in iter_rows(path))


def _write(files: Files, sides: Ints, handles: Mapping[str, BinaryIO], fields: Sequence[tuple[str, str]]) -> None:
    for (_, row), side in zip(_rows(files), sides.tolist(), strict=True):
        handles[SPLITS[side]].write(as_json_line(row, fields) + b"\n")
