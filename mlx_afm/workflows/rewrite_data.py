"""Training data written anew: split into train, valid and test, or in another data format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_afm.data.config import DataConfig
from mlx_afm.data.convert import convert_data
from mlx_afm.data.sources import Files, find_splits, require_splits
from mlx_afm.data.split import DataSplit, SplitConfig, require_other_files, split_data
from mlx_afm.errors import ConfigError
from mlx_afm.files import atomic_folder, to_path
from mlx_afm.folders import OnNote, ignore_note, lock_folder, new_folder


def split(
    data: str | Path,
    out: str | Path,
    config: SplitConfig,
    data_config: DataConfig | None = None,
    *,
    overwrite: bool = False,
    on_note: OnNote = ignore_note,
) -> DataSplit:
    """Writes train, valid and test files without a prompt on two sides; see `split_data`, for `on_note` `lock_folder`.

    Raises:
        ConfigError: the data is split already, the folder holds splits that the results would join or replace, or
            another process writes it.
    """
    data = to_path(data)
    out = to_path(out)
    splits = require_splits(data)
    if len(splits) > 1:
        advice = "Name the one file to split."
        raise ConfigError("the data is split already", where=data, found=", ".join(splits), advice=advice)
    (files,) = splits.values()
    require_other_files(files, [out / f"{name}.jsonl" for name in config.sides])
    with lock_folder(out, on_note=on_note):
        _require_room(out, config, overwrite)
        return split_data(files, out, config, data_config)


def _require_room(out: Path, config: SplitConfig, overwrite: bool) -> None:
    """Raises ConfigError unless the splits in a folder afterwards would be the new ones alone."""
    if not out.is_dir():
        return
    written = {f"{name}.jsonl" for name in config.sides}
    there = [file.name for files in find_splits(out).values() for file in files]
    if there and not overwrite:
        advice = "Choose another folder, or replace them with --overwrite."
        raise ConfigError("there are splits in this folder already", where=out, found=", ".join(there), advice=advice)
    if others := [name for name in there if name not in written]:
        advice = "Remove them: they would stay beside the new splits and may share examples with them."
        raise ConfigError("other splits in this folder", where=out, found=", ".join(others), advice=advice)


def convert(
    source: str | Path,
    target: str | Path,
    data_format: str,
    data_config: DataConfig | None = None,
    columns: Sequence[str] = (),
    *,
    overwrite: bool = False,
    on_note: OnNote = ignore_note,
) -> dict[str, int]:
    """Writes data in another data format; see `convert_data`.

    Args:
        source: a file; or a folder with train, valid and test files, which become as many `.jsonl` files
            in the folder `target`, all or none.
        target: file or folder.
        data_format: one of `DATA_FORMATS`.
        data_config: how to read.
        columns: names of the columns of tables whose first line does not name them.
        overwrite: replace the file `target` if it is there.
        on_note: see `lock_folder`.

    Raises:
        ConfigError: the folder `target` is not empty, or the file is there.

    Returns:
        Path of each file written, and its number of records.
    """
    source = to_path(source)
    target = to_path(target)
    splits = require_splits(source)
    if _is_one(source, splits):
        require_other_files(splits["train"], [target])
        if target.is_file() and not overwrite:
            advice = "Choose another name, or replace it with --overwrite."
            raise ConfigError("the file exists", where=target, advice=advice)
        return {str(target): convert_data(splits["train"], target, data_format, data_config, columns)}
    written: dict[str, int] = {}
    with new_folder(target, "target", on_note), atomic_folder(target) as partial:
        for name, files in splits.items():
            written[str(target / f"{name}.jsonl")] = convert_data(
                files, partial / f"{name}.jsonl", data_format, data_config, columns
            )
    return written


def _is_one(source: Path, splits: dict[str, Files]) -> bool:
    """Whether the source is a file or a saved data set rather than a folder of splits."""
    return splits.get("train") == (source,)
