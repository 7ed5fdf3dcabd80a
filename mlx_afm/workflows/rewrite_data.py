"""Training data written anew: split into train, valid and test, or in another dialect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_afm.data.config import DataConfig
from mlx_afm.data.convert import convert_data
from mlx_afm.data.sources import Files
from mlx_afm.data.split import Split, SplitConfig, split_data
from mlx_afm.errors import ConfigError
from mlx_afm.files import atomic_folder
from mlx_afm.folders import OnNote, ignore_note, lock_folder, new_folder
from mlx_afm.workflows.check_data import require_splits


def split(
    data: Path, out: Path, config: SplitConfig, reading: DataConfig | None = None, on_note: OnNote = ignore_note
) -> Split:
    """Writes train, valid and test files without a prompt on two sides; see `split_data`, for `on_note` `lock_folder`.

    Raises:
        ConfigError: the data is split already, or another process writes the folder.
    """
    splits = require_splits(data)
    if len(splits) > 1:
        advice = "Name the one file to split."
        raise ConfigError("the data is split already", where=data, found=", ".join(splits), advice=advice)
    with lock_folder(out, on_note=on_note):
        return split_data(next(iter(splits.values())), out, config, reading)


def convert(
    source: Path,
    target: Path,
    dialect: str,
    reading: DataConfig | None = None,
    columns: Sequence[str] = (),
    on_note: OnNote = ignore_note,
) -> dict[str, int]:
    """Writes data in another dialect; see `convert_data`.

    Args:
        source: a file; or a folder with train, valid and test files, which become as many `.jsonl` files
            in the folder `target`, all or none.
        target: file or folder.
        dialect: one of `DIALECTS`.
        reading: how to read.
        columns: names of the columns of tables whose first line does not name them.
        on_note: see `lock_folder`.

    Raises:
        ConfigError: the folder `target` is not empty.

    Returns:
        Path of each file written, and its number of records.
    """
    splits = require_splits(source)
    if _is_one(source, splits):
        return {str(target): convert_data(splits["train"], target, dialect, reading, columns)}
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("the output folder is not empty", where=target, advice="Choose another.")
    written: dict[str, int] = {}
    with new_folder(target, "target", on_note), atomic_folder(target) as partial:
        for name, files in splits.items():
            written[str(target / f"{name}.jsonl")] = convert_data(
                files, partial / f"{name}.jsonl", dialect, reading, columns
            )
    return written


def _is_one(source: Path, splits: dict[str, Files]) -> bool:
    """Whether the source is a file or a saved data set rather than a folder of splits."""
    return splits.get("train") == (source,)
