"""A split to a table of tokens, every record checked; encoded once and then read from a cache."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np

from mlx_afm._version import __version__
from mlx_afm.data.batches import TokenTable
from mlx_afm.data.config import DataConfig
from mlx_afm.data.prepare import Prepared, examples_array, iter_blocks
from mlx_afm.data.records import Example, RecordReader, transform_source
from mlx_afm.data.report import Problem, to_problems
from mlx_afm.data.sources import Files, file_faults, iter_rows
from mlx_afm.data.workers import prepare_all, to_tokenizer
from mlx_afm.errors import DataError, FormatError
from mlx_afm.files import atomic_folder, read_json, sha256_of, to_optional_path, to_path, write_json
from mlx_afm.text.template import SPECIAL_TOKENS
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.tree import shorten

ARRAYS = ("ids", "weights", "starts", "places")
META = "meta.json"
ENCODED = "tokens"  # folder of the cache
ENCODING = 3  # raise it when the same line becomes other tokens
KEPT_DAYS = 30
CACHE_VARIABLE, CACHE_OFF = "MLX_AFM_CACHE", "off"  # with this value nothing encoded is kept
PRIVATE = 0o700  # encoded data can be decoded again: it is for nobody else's eyes


def read_tokens(
    files: Files,
    tokenizer: AFMTokenizer | str | Path,
    config: DataConfig | None = None,
    *,
    cache: str | Path | None = None,
    workers: int | None = None,
) -> TokenTable:
    """All examples of a split, encoded.

    Args:
        files: from `find_splits`.
        tokenizer: the model's, or its `tokenizer.model`.
        config: how to read.
        cache: folder to keep the result in (`default_cache`); None keeps nothing.
        workers: processes, see `prepare_all`.

    Raises:
        DataError: no example at all, or records that would teach the wrong thing: all of them, each
            with file and line.
        FormatError: a file cannot be read.
        ConfigError: no such transform.
    Cost: with the cache, the second time takes as long as reading the files once to compare them.
    """
    tokenizer = to_tokenizer(tokenizer)
    cache = to_optional_path(cache)
    config = config or DataConfig()
    entry = None if cache is None else _entry(cache, files, tokenizer, config)
    cached = None if entry is None else _load(entry, files)
    if cached is not None:
        return cached
    problems = [p for file in files for fault in file_faults(file) for p in to_problems(fault, str(file), 1)]
    parts = []
    for part in prepare_all(iter_blocks(files), config, tokenizer, want_tokens=True, workers=workers):
        problems += [problem for problem in part.problems if problem.is_error]
        if not problems:
            parts.append(part)
    _refuse(problems, files)
    table = _table(parts, files)
    if not len(table):
        lost = f"; {table.dropped} were too long and left out" if table.dropped else ""
        raise DataError("no examples" + lost, kind="no-examples", where=files[0], expected="at least one record")
    if entry is not None:
        _store(entry, table)
    return table


def read_examples(
    files: Files, special_pieces: Sequence[str] = SPECIAL_TOKENS, config: DataConfig | None = None
) -> list[Example]:
    """All examples of a split as conversations, in this process and without the cache.

    Raises:
        DataError, FormatError, ConfigError: see `read_tokens`.
    """
    read = RecordReader(config or DataConfig(), special_pieces)
    examples: list[Example] = []
    problems = [p for file in files for fault in file_faults(file) for p in to_problems(fault, str(file), 1)]
    for path in files:
        for row in iter_rows(path):
            try:
                examples.append(read(row, len(examples), f"{path.name} line {row.line}"))
            except DataError as error:
                problems += to_problems(error, str(path), row.line)
    _refuse(problems, files)
    if not examples:
        raise DataError("no examples", kind="no-examples", where=files[0], expected="at least one record")
    return examples


def _refuse(problems: Sequence[Problem], files: Files) -> None:
    if problems:
        lines = len({(problem.file, problem.line) for problem in problems})
        advice = "Nothing was trained; correct the lines and start again: mlx-afm data check shows them all."
        details = shorten(map(str, problems))
        raise DataError(f"{lines} faulty line(s)", kind="faulty-lines", where=files[0], advice=advice, details=details)


def _table(parts: Sequence[Prepared], files: Files) -> TokenTable:
    examples = examples_array(parts)
    file_of = np.concatenate([np.full(len(part.examples), part.file) for part in parts] or [np.zeros(0)])
    lost = [loss for part in parts for loss in part.lost]
    return TokenTable(
        files=tuple(file.name for file in files),
        ids=np.concatenate([part.ids for part in parts] or [np.zeros(0, np.int32)]),
        weights=np.concatenate([part.weights for part in parts] or [np.zeros(0, np.bool_)]),
        starts=np.concatenate([[0], np.cumsum(examples[:, 1])]).astype(np.int64),
        places=np.stack([file_of.astype(np.int64), examples[:, 0]], axis=1),
        removed_tokens=sum(removed for _, removed, _ in lost),
        dropped=sum(left_out for _, _, left_out in lost),
    )


def default_cache() -> Path | None:
    """The folder that keeps encoded data: `cache_folder`. None, so that nothing is kept, if $MLX_AFM_CACHE is `off`."""
    return None if os.environ.get(CACHE_VARIABLE) == CACHE_OFF else cache_folder()


def cache_folder() -> Path:
    """The library's cache folder: `$MLX_AFM_CACHE` unless it is `off`, else `mlx-afm` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    home = to_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return to_path(chosen) if chosen and chosen != CACHE_OFF else home / "mlx-afm"


def _entry(cache: Path, files: Files, tokenizer: AFMTokenizer, config: DataConfig) -> Path | None:
    """The folder of a result; None if it depends on what cannot be compared."""
    if any(file.is_dir() for file in files):
        return None
    source = "" if config.transform is None else transform_source(config.transform)
    if source is None:
        return None
    facts = [ENCODING, __version__, asdict(config), source, tokenizer.sha256]
    facts += [[file.name, sha256_of(file)] for file in files]
    return cache / ENCODED / sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _load(entry: Path, files: Files) -> TokenTable | None:
    """An entry; None if there is none, or another process is just putting its own in its place."""
    try:
        os.utime(entry / META)
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        counts = read_json(entry / META)
    except (FileNotFoundError, FormatError):
        return None
    return TokenTable(tuple(file.name for file in files), **arrays, **counts)


def _store(entry: Path, table: TokenTable) -> None:
    """Writes an entry whole or not at all, and deletes those unused for a month. Only the user can read any of them."""
    try:
        entry.parent.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
        entry.parent.mkdir(PRIVATE, exist_ok=True)
        entry.parent.chmod(PRIVATE)  # earlier releases left it open to all
        for old in entry.parent.iterdir():  # also what a killed process left half-written
            with suppress(FileNotFoundError):
                used = (old / META if (old / META).exists() else old).stat().st_mtime
                if time.time() - used > KEPT_DAYS * 86400:
                    shutil.rmtree(old, ignore_errors=True)
        if all((entry / name).exists() for name in (META, *(f"{name}.npy" for name in ARRAYS))):
            return  # another process was faster
        with atomic_folder(entry) as folder:
            for name in ARRAYS:
                np.save(folder / f"{name}.npy", getattr(table, name))
            write_json(folder / META, {"removed_tokens": table.removed_tokens, "dropped": table.dropped})
        entry.chmod(PRIVATE)
    except OSError:
        return  # a cache that cannot be written is no reason not to train
