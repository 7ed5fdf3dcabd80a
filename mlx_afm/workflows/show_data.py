"""Training data in numbers, and some of it as the model sees it."""

from __future__ import annotations

from pathlib import Path

from mlx_afm.data.config import DataConfig
from mlx_afm.data.sample import ExampleChoice, Sample, sample_examples
from mlx_afm.data.sources import require_splits
from mlx_afm.data.stats import OnProgress, SplitStats, measure_split
from mlx_afm.files import to_path
from mlx_afm.workflows.check_data import tokenizer_of


def stats(
    data: str | Path, model: str | Path, reading: DataConfig | None = None, *, on_progress: OnProgress | None = None
) -> dict[str, SplitStats]:
    """Each split in numbers; see `measure_split`.

    Args:
        data: a folder with train, valid and test files, or one file.
        model: model folder, or the hub id of one, for its tokenizer.
        reading: how the data becomes tokens.
        on_progress: told of bytes read and in all, for each split.
    """
    data = to_path(data)
    model = to_path(model)
    splits, tokenizer = require_splits(data), tokenizer_of(model)
    return {name: measure_split(files, tokenizer, reading, on_progress=on_progress) for name, files in splits.items()}


def samples(
    data: str | Path,
    model: str | Path,
    choice: ExampleChoice,
    reading: DataConfig | None = None,
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
    return sample_examples(splits[name], tokenizer_of(model), choice, reading)
