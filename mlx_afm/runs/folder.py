"""The folder of a run: adapter, best adapter, metrics, and the state it is resumed from.

    adapters.safetensors, adapter_config.json    the last adapter
    best/                                        the one with the lowest validation loss
    metrics.jsonl                                one event a line
    training_state.safetensors                   see `state.py`; the only file that a resumed run reads

Killed at any moment the folder can be resumed, since of all files the state alone counts, and it is
replaced as a whole: a new run writes its state before it touches anything else; `best/` is written
before the state that knows of it; the last adapter after its state, and again when a run is resumed;
`metrics.jsonl` is cut to the length the state remembers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from mlx_afm.adapters import adapter_weights
from mlx_afm.adapters.store import CONFIG, WEIGHTS, write_adapter_weights
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.errors import ConfigError, DiskFullError, FormatError
from mlx_afm.files import DISK_FULL, disk_full, read_json, to_json, write_json
from mlx_afm.model import Model
from mlx_afm.runs.state import STATE, RunFingerprint, SavedRun, read_run, read_state, write_state
from mlx_afm.training import Event, Snapshot, is_recorded, to_record

METRICS = "metrics.jsonl"
STATE_TIMES = 3  # size of the state over that of the trained weights, with Adam's two moments
_UNREADABLE = (KeyError, TypeError, ValueError)  # values that are not a run's
BEST = "best"


class RunFolder:
    """Writes what a run leaves behind; a context manager, since `metrics.jsonl` stays open.

    Args:
        folder: made if it does not exist.
        model: whose adapter is saved.
        settings: content of `adapter_config.json`.
        fingerprint, total_steps: kept with the state.
    """

    def __init__(
        self, folder: Path, model: Model, settings: Mapping[str, Any], fingerprint: RunFingerprint, total_steps: int
    ) -> None:
        self.folder, self.model, self.settings = folder, model, json.loads(json.dumps(settings))
        self.fingerprint, self.total_steps = fingerprint, total_steps
        self.has_state = False
        self._metrics: FileIO | None = None

    def __enter__(self) -> RunFolder:
        Path(os.path.realpath(self.folder)).mkdir(parents=True, exist_ok=True)  # also what a link names
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def go_on(self, saved: SavedRun) -> None:
        """Continues `metrics.jsonl` where the state left it."""
        handle = (self.folder / METRICS).open("r+b" if (self.folder / METRICS).exists() else "w+b", buffering=0)
        handle.truncate(min(saved.metrics_bytes, handle.seek(0, os.SEEK_END)))
        handle.seek(0, os.SEEK_END)
        self._metrics, self.has_state = handle, True

    def save_state(self, snapshot: Snapshot) -> None:
        """Writes the state; the first one of a new run makes an end of what an earlier run left."""
        length = 0
        if self._metrics is not None:
            with self._resumable():
                os.fsync(self._metrics.fileno())
            length = self._metrics.tell()
        with self._resumable():
            write_state(self.folder / STATE, SavedRun(snapshot, self.fingerprint, self.total_steps, length))
        self.has_state = True
        if self._metrics is None:
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            self._metrics = (self.folder / METRICS).open("wb", buffering=0)

    def save(self, kind: str) -> None:
        """Writes the adapter as "last" or "best"."""
        folder = self.folder if kind == "last" else self.folder / BEST
        with self._resumable():
            folder.mkdir(exist_ok=True)
            if not self._has_settings(folder):
                (folder / WEIGHTS).unlink(missing_ok=True)  # rather none than one with another's settings
                write_json(folder / CONFIG, self.settings)
            weights = {name: from_mlx(array) for name, array in adapter_weights(self.model).items()}
            write_adapter_weights(folder / WEIGHTS, weights)

    def _has_settings(self, folder: Path) -> bool:
        try:
            return bool(read_json(folder / CONFIG) == self.settings)
        except FormatError:
            return False

    def record(self, event: Event) -> None:
        """Appends an event to `metrics.jsonl`, at once."""
        if self._metrics is not None and is_recorded(event):
            line = (to_json(to_record(event), ascii_only=True) + "\n").encode()
            with self._resumable():
                while line:  # an unbuffered write may take a part
                    line = line[self._metrics.write(line) :]

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """Says of a full disk that the run can be resumed, if it can."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, DiskFullError) and error.errno not in DISK_FULL:
                raise
            full = error if isinstance(error, DiskFullError) else disk_full(self.folder, None)
            advice = "Free some space, then repeat the command"
            advice += " with --resume: the last saved state is intact." if self.has_state else "."
            raise DiskFullError(
                full.what, where=full.where, expected=full.expected, found=full.found, advice=advice
            ) from error


def missing_bytes(folder: Path, trained_bytes: int) -> int:
    """Free bytes that a run needs to end: what it writes, less what its files take already.

    Two states (the new one is whole before the old one goes), the last adapter and the best one.
    """
    kept = (folder / STATE, folder / WEIGHTS, folder / BEST / WEIGHTS)
    there = sum(file.stat().st_size for file in kept if file.is_file())
    return max(STATE_TIMES * trained_bytes, (2 * STATE_TIMES + 2) * trained_bytes - there)


def best_adapter(folder: Path) -> Path:
    """The best adapter of a run, by validation loss: the folder `best` in the folder of the run.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / BEST / WEIGHTS).is_file():
        advice = "Without validation data a run has no best adapter; leave --best out to use the last one."
        raise ConfigError("no best adapter here", where=folder, expected=f"{BEST}/{WEIGHTS}", advice=advice)
    return folder / BEST


def require_no_finished_run(folder: Path) -> None:
    """Checks that a new run replaces neither a finished run nor an adapter of unknown origin.

    Raises:
        ConfigError: there is one.
    """
    found = _finished(folder)
    if found is not None:
        advice = "Choose another folder, or replace it with --overwrite."
        raise ConfigError("training would replace what is here", where=folder, found=found, advice=advice)


def _finished(folder: Path) -> str | None:
    """What a folder holds that a new run must not replace unasked, in words; None for nothing."""
    if (folder / STATE).exists():
        try:
            return _finished_run(read_run(folder / STATE))
        except (FormatError, *_UNREADABLE):
            pass  # the adapter may still be whole
    if (folder / WEIGHTS).exists() or (folder / BEST / WEIGHTS).exists():
        return "an adapter without a readable state of its run"
    return None


def _finished_run(values: Mapping[str, Any]) -> str | None:
    state, total = values["snapshot"]["state"], int(values["total_steps"])
    step = int(state["step"])
    return f"a finished run of {step} steps" if step >= total or bool(state["stopped_early"]) else None


def find_saved_run(folder: Path) -> SavedRun | None:
    """The run to resume in a folder; None if it holds no run at all.

    Raises:
        ConfigError: an adapter without the state of its run. FormatError: a damaged state.
    """
    if (folder / STATE).exists():
        return read_state(folder / STATE)
    if (folder / WEIGHTS).exists():
        advice = f"Start a new run from its values: --resume-adapter-file {folder} (another --adapter-path)."
        raise ConfigError("an adapter, but not the state of its run", where=folder, expected=STATE, advice=advice)
    return None


def describe_replaced(folder: Path) -> str | None:
    """What a new run in a folder is about to replace, in words; None if there is no run."""
    if not (folder / STATE).exists():
        return None
    try:
        values = read_run(folder / STATE)
        step, total = int(values["snapshot"]["state"]["step"]), int(values["total_steps"])
        finished = _finished_run(values)
    except (FormatError, *_UNREADABLE):
        return f"starting anew: {folder} holds a run whose state cannot be read"
    if finished is not None:
        return f"starting anew: {finished} in {folder} is replaced"
    return f"starting anew: the unfinished run in {folder} (step {step} of {total}) is replaced; --resume continues one"
