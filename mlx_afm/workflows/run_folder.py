"""The folder of a run: adapter, best adapter, metrics, and the state it is resumed from.

    adapters.safetensors, adapter_config.json    the last adapter
    best/                                        the one with the lowest validation loss
    metrics.jsonl                                one event a line
    training_state.safetensors                   see `run_state`; the only file that a resumed run reads

Killed at any moment the folder can be resumed, since of all files the state alone counts, and it is
replaced as a whole: a new run writes its state before it touches anything else; `best/` is written
before the state that knows of it; the last adapter after its state, and again when a run is resumed;
`metrics.jsonl` is cut to the length the state remembers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.adapters import adapter_weights
from mlx_afm.adapters.store import CONFIG, WEIGHTS, write_adapter_weights
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import read_json, to_json, write_json
from mlx_afm.model import Model
from mlx_afm.training import Event, Snapshot, is_recorded, to_record
from mlx_afm.workflows.run_state import STATE, Course, SavedRun, read_run, read_state, write_state

METRICS = "metrics.jsonl"
BEST = "best"


class RunFolder:
    """Writes what a run leaves behind; a context manager, since `metrics.jsonl` stays open.

    Args:
        folder: made if it does not exist.
        model: whose adapter is saved.
        settings: content of `adapter_config.json`.
        course, total_steps: kept with the state.
    """

    def __init__(
        self, folder: Path, model: Model, settings: Mapping[str, Any], course: Course, total_steps: int
    ) -> None:
        self.folder, self.model, self.settings = folder, model, json.loads(json.dumps(settings))
        self.course, self.total_steps = course, total_steps
        self._metrics: BinaryIO | None = None

    def __enter__(self) -> RunFolder:
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in (self.folder, self.folder / BEST):
            for left in (*place.glob(f".{STATE}.*.part"), *place.glob(f".{WEIGHTS}.*.part")):
                left.unlink(missing_ok=True)  # of a run that was killed while it wrote
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def go_on(self, saved: SavedRun) -> None:
        """Continues `metrics.jsonl` where the state left it."""
        handle = (self.folder / METRICS).open("r+b" if (self.folder / METRICS).exists() else "w+b")
        handle.truncate(min(saved.metrics_bytes, handle.seek(0, os.SEEK_END)))
        handle.seek(0, os.SEEK_END)
        self._metrics = handle

    def save_state(self, snapshot: Snapshot) -> None:
        """Writes the state; the first one of a new run makes an end of what an earlier run left."""
        length = 0
        if self._metrics is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
            length = self._metrics.tell()
        write_state(self.folder / STATE, SavedRun(snapshot, self.course, self.total_steps, length))
        if self._metrics is None:
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            self._metrics = (self.folder / METRICS).open("wb")

    def save(self, kind: str) -> None:
        """Writes the adapter as "last" or "best"."""
        folder = self.folder if kind == "last" else self.folder / BEST
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
            self._metrics.write((to_json(to_record(event), ascii_only=True) + "\n").encode())
            self._metrics.flush()


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


def describe_unfinished(folder: Path) -> str | None:
    """What a new run in a folder is about to replace: an unfinished run, in words; None if there is none."""
    if not (folder / STATE).exists():
        return None
    try:
        values = read_run(folder / STATE)
        step, total = int(values["snapshot"]["state"]["step"]), int(values["total_steps"])
        stopped = bool(values["snapshot"]["state"]["stopped_early"])
    except (FormatError, KeyError, TypeError, ValueError):
        return f"starting anew: {folder} holds a run whose state cannot be read"
    if step >= total or stopped:
        return None
    return f"starting anew: the unfinished run in {folder} (step {step} of {total}) is replaced; --resume continues one"
