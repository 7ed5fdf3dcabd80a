"""Training data: checked before training, copied without its problems, in numbers, and as the model sees it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_afm.data.check import OnProgress, check_data
from mlx_afm.data.config import DataConfig
from mlx_afm.data.fix import Fixed, fix_data
from mlx_afm.data.report import DataReport
from mlx_afm.data.sample import ExampleChoice, Sample, sample_examples
from mlx_afm.data.sources import find_unread, require_splits
from mlx_afm.data.stats import SplitStats, measure_split
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import to_optional_path, to_path
from mlx_afm.folders import OnNote, ignore_note, lock_folder, require_replaceable
from mlx_afm.model_folder import ModelFolder
from mlx_afm.text.tokenizer import AFMTokenizer


def check(
    data: str | Path,
    data_config: DataConfig | None = None,
    *,
    model: str | Path | None = None,
    fix: str | Path | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote = ignore_note,
) -> tuple[DataReport, Fixed | None]:
    """What is wrong with training data, and what was done about it.

    Args:
        data: a folder with train, valid and test files, or one file.
        data_config: how the data becomes tokens.
        model: model folder, or the hub id of one; its tokenizer tells how long examples are.
        fix: folder for a copy without the problems; None writes none.
        on_progress: told of bytes read and in all.
        on_note: see `lock_folder`.

    Raises:
        FormatError: no such data. ConfigError: a model folder without tokenizer, no such transform, or
            a folder for the copy that is not empty. DataError: no example would be left in the copy.
    """
    data = to_path(data)
    model = to_optional_path(model)
    fix = to_optional_path(fix)
    splits = require_splits(data)
    unread = tuple(map(str, find_unread(data, splits)))
    tokenizer = None if model is None else tokenizer_of(model)
    if fix is None:
        report = check_data(splits, data_config, tokenizer, on_progress=on_progress)
        return replace(report, unread_files=unread), None
    with lock_folder(fix, on_note=on_note):
        require_replaceable(fix, "folder")
        fixed = fix_data(splits, fix, data_config, tokenizer, on_progress=on_progress)
    return replace(fixed.report, unread_files=unread), fixed


def tokenizer_of(model: str | Path) -> AFMTokenizer:
    """The tokenizer of a model folder, which need not hold a model.

    Raises:
        ConfigError: the folder has none. FormatError: no such folder, or no tokenizer.
    """
    folder = ModelFolder(model)
    if not folder.path.is_dir():
        raise FormatError("no such folder", where=to_path(model), expected="a model folder, for its tokenizer")
    if folder.tokenizer_file is None:
        advice = "Choose one with tokenizer.model; without --model lengths are not checked."
        raise ConfigError("the model folder has no tokenizer", where=folder.path, advice=advice)
    return AFMTokenizer.from_file(folder.tokenizer_file)


def stats(
    data: str | Path, model: str | Path, data_config: DataConfig | None = None, *, on_progress: OnProgress | None = None
) -> dict[str, SplitStats]:
    """Each split in numbers; see `measure_split`.

    Args:
        data: a folder with train, valid and test files, or one file.
        model: model folder, or the hub id of one, for its tokenizer.
        data_config: how the data becomes tokens.
        on_progress: told of bytes read and in all, for each split.
    """
    data = to_path(data)
    model = to_path(model)
    splits, tokenizer = require_splits(data), tokenizer_of(model)
    measured = partial(measure_split, tokenizer=tokenizer, config=data_config, on_progress=on_progress)
    return {name: measured(files) for name, files in splits.items()}


def samples(
    data: str | Path,
    model: str | Path,
    choice: ExampleChoice,
    data_config: DataConfig | None = None,
    split: str | None = None,
) -> list[Sample]:
    """Some examples of a split as the model sees them; see `sample_examples`.

    Raises:
        FormatError: no such split; the first there is if None.
    """
    data = to_path(data)
    model = to_path(model)
    splits = require_splits(data, *([] if split is None else [split]))
    name = next(iter(splits)) if split is None else split
    return sample_examples(splits[name], tokenizer_of(model), choice, data_config)
