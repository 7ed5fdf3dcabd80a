"""Every line of training data looked at before training, with training's own eyes.

Records go through `prepare_all` as they do for training, so that what training would refuse is
reported here and the other way round. Added to that is what no single line shows: examples that
stand twice in a split, or in two splits.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path

from mlx_afm.data.config import DataConfig
from mlx_afm.data.prepare import EXAMPLE, LINE, TOKENS, TRAINED, Block, Prepared, examples_array, iter_blocks
from mlx_afm.data.repeats import Fingerprints, find_duplicates, find_overlap
from mlx_afm.data.report import CheckedFile, DataReport, Problem, ProblemList, to_problems
from mlx_afm.data.sources import SPLITS, Files, file_faults
from mlx_afm.data.workers import prepare_all, to_tokenizer
from mlx_afm.errors import FormatError
from mlx_afm.text.tokenizer import AFMTokenizer

OnProgress = Callable[[int, int], None]
HELD_OUT = (("valid", "train"), ("test", "train"), ("test", "valid"))  # what is scored, and what it must not share with


def check_data(
    splits: Mapping[str, Files],
    config: DataConfig | None = None,
    tokenizer: AFMTokenizer | str | Path | None = None,
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> DataReport:
    """Everything that is wrong with training data; nothing is raised for what its lines hold.

    Args:
        splits: from `find_splits`.
        config: how to read.
        tokenizer: the model's, or its `tokenizer.model`; without it lengths are not checked, nor special
            tokens beyond the special tokens of turns and tool calls.
        workers: processes, see `prepare_all`.
        on_progress: told of bytes read and in all.

    Raises:
        FormatError: no splits at all.
        ConfigError: no such transform.
        MissingDependencyError: a form that needs the `datasets` library.
    Cost: 12 bytes an example, 20 while they are compared, and at most 10,000 problems of a kind.
    """
    tokenizer = None if tokenizer is None else to_tokenizer(tokenizer)
    return validate(splits, config, tokenizer, workers=workers, on_progress=on_progress).report


@dataclass
class Unused:
    """Lines of a file that give training no example, and for each the kind of problem, numbered."""

    lines: array[int] = field(default_factory=lambda: array("q"))
    kinds: array[int] = field(default_factory=lambda: array("H"))

    def add(self, line: int, kind: int) -> None:
        """Takes a line; of several problems of one line the first counts."""
        if not self.lines or self.lines[-1] != line:
            self.lines.append(line)
            self.kinds.append(kind)


@dataclass
class ValidationResult:
    """A report, and what is needed to write a copy without the problems.

    Attributes:
        report: what was found.
        splits: the files.
        prints: fingerprints of the good examples of each split.
        unused: for each file the lines that training refuses, or leaves out as too long.
        kinds: names of the kinds in `unused`.
        unreadable: files that could not be read to their end.
    """

    report: DataReport
    splits: Mapping[str, Files]
    prints: dict[str, Fingerprints]
    unused: list[Unused]
    kinds: list[str]
    unreadable: set[str]


def validate(
    splits: Mapping[str, Files],
    config: DataConfig | None = None,
    tokenizer: AFMTokenizer | None = None,
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> ValidationResult:
    """See `check_data`."""
    if not splits:
        raise FormatError("no training data", expected="train.jsonl, valid.jsonl or test.jsonl")
    validator = _Validator(splits, config or DataConfig(), tokenizer, on_progress or (lambda done, total: None))
    blocks = validator.blocks()
    for part in prepare_all(blocks, validator.config, tokenizer, want_tokens=False, workers=workers):
        validator.take(part)
    return validator.finish()


class _Validator:
    """Gathers what becomes of the blocks of all splits."""

    def __init__(
        self, splits: Mapping[str, Files], config: DataConfig, tokenizer: AFMTokenizer | None, on_progress: OnProgress
    ) -> None:
        self.splits, self.config, self.has_tokenizer, self.on_progress = (
            splits,
            config,
            bool(tokenizer),
            on_progress,
        )
        self.names = [name for name in SPLITS if splits.get(name)]
        self.paths = list(chain.from_iterable(splits[name] for name in self.names))
        self.files = [CheckedFile(str(path), name) for name in self.names for path in splits[name]]
        self.problems = ProblemList()
        self.prints = {name: Fingerprints() for name in self.names}
        self.unused = [Unused() for _ in self.files]
        self.kinds: dict[str, int] = {}
        self.unreadable: set[str] = set()
        self.bad_splits: set[str] = set()  # those with an error

    def blocks(self) -> Iterator[Block]:
        """The blocks of all files; one that cannot be read is a problem, and the others are read all the same."""
        total, done, index = sum(path.stat().st_size for path in self.paths if path.is_file()), 0, 0
        for number, path in enumerate(self.paths):
            if number == 0 or self.files[number].split != self.files[number - 1].split:
                index = 0  # records are counted within their split
            try:
                self._add(number, [p for fault in file_faults(path) for p in to_problems(fault, str(path), 1)])
                for block in iter_blocks((path,), index):
                    yield replace(block, file=number)
                    index = block.first_index + len(block.rows)
                    done += sum(len(row.text) + 1 for row in block.rows)
                    if done < total:
                        self.on_progress(done, total)
            except (FormatError, OSError) as error:
                self._unreadable(number, error)
        if total:
            self.on_progress(total, total)

    def _unreadable(self, number: int, error: FormatError | OSError) -> None:
        file = self.files[number].file
        what = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        self.unreadable.add(file)
        self._add(number, [Problem(file, 1, "unreadable-file", what.removeprefix(f"{file}: "))])

    def _add(self, number: int, problems: list[Problem]) -> None:
        self.problems.add(problems)
        if any(problem.is_error for problem in problems):
            self.bad_splits.add(self.files[number].split)

    def take(self, part: Prepared) -> None:
        """What became of one block."""
        self._add(part.file, part.problems)
        unused = [(problem.line, problem.kind) for problem in part.problems if problem.is_error]
        unused += [(line, "too-long") for line, _, left_out in part.lost if left_out]
        for line, kind in sorted(unused, key=itemgetter(0)):
            self.unused[part.file].add(line, self.kinds.setdefault(kind, len(self.kinds)))
        examples, file = examples_array([part]), self.files[part.file]
        self.prints[file.split].add(part.file, examples[:, LINE], examples[:, EXAMPLE])
        dropped = sum(left_out for _, _, left_out in part.lost)
        self.files[part.file] = replace(
            file,
            records=file.records + part.rows,
            examples=file.examples + len(examples),
            tokens=file.tokens + int(examples[:, TOKENS].sum()),
            trained_tokens=file.trained_tokens + int(examples[:, TRAINED].sum()),
            dropped=file.dropped + dropped,
            shortened=file.shortened + len(part.lost) - dropped,
            removed_tokens=file.removed_tokens + sum(removed for _, removed, _ in part.lost),
        )

    def finish(self) -> ValidationResult:
        """The report of all of it."""
        for name in self.names:
            if not len(self.prints[name]) and name not in self.bad_splits:
                self._no_examples(name)
            self._duplicates(name)
        for held_out, other in HELD_OUT:
            if held_out in self.names and other in self.names:
                self._overlap(held_out, other)
        order = {file.file: number for number, file in enumerate(self.files)}
        counts = {kind: self.problems.counts[kind] for kind in sorted(self.problems.counts)}
        problems = self.problems.sorted(order)
        report = DataReport(tuple(self.files), problems, counts, self.has_tokenizer, self.config.max_tokens)
        return ValidationResult(report, self.splits, self.prints, self.unused, list(self.kinds), self.unreadable)

    def _no_examples(self, split: str) -> None:
        files = [file for file in self.files if file.split == split]
        dropped = sum(file.dropped for file in files)
        reason = f": all {dropped} are too long and left out" if dropped else ""
        self.problems.add([Problem(files[0].file, 1, "no-examples", f"no examples{reason}. Add at least one record")])

    def _duplicates(self, split: str) -> None:
        prints = self.prints[split]
        for later, first in find_duplicates(prints):
            kept = self.problems.room("duplicate")
            for (file, line), other in zip(prints.places(later[:kept]), prints.places(first[:kept])):
                message = f"the same example as {self._named(other, file)}: it counts twice"
                self.problems.add([Problem(self.files[file].file, line, "duplicate", message)])
            self.problems.counts["duplicate"] += len(later[kept:])

    def _overlap(self, held_out: str, split: str) -> None:
        prints, others = self.prints[held_out], self.prints[split]
        for examples, first in find_overlap(prints, others):
            kept = self.problems.room("overlap")
            for (file, line), other in zip(prints.places(examples[:kept]), others.places(first[:kept])):
                message = (
                    f"this {held_out} example is {self._named(other, file)} too, so that its score says little. "
                    f"Take it out of one of them; data check --fix takes it out of {split}"
                )
                self.problems.add([Problem(self.files[file].file, line, "overlap", message)])
            self.problems.counts["overlap"] += len(examples[kept:])

    def _named(self, place: tuple[int, int], file: int) -> str:
        return f"line {place[1]}" if place[0] == file else f"{self.paths[place[0]].name} line {place[1]}"
