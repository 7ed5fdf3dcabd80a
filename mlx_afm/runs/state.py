"""`training_state.safetensors`: one file that holds all a run needs to go on, and what it must not differ in.

    weights.NAME      a trained tensor
    optimizer.NAME    a tensor of the optimizer's state
    __metadata__      "format": FORMAT; "run": JSON {"version", "snapshot", "course", "total_steps",
                      "metrics_bytes"}; "crc32": of the JSON, the names and the values, in hex

Written in one piece or not at all. Its size is that of the trained weights times one plus the
optimizer's share: with Adam's two moments three times the adapter, 0.8 GB at rank 32 of the real model.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_afm.adapters import LoRAConfig
from mlx_afm.checkpoints.arrays import from_mlx, to_mlx
from mlx_afm.data import Tokens
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.formats.safetensors_file import read_metadata, read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.training import Snapshot, TrainConfig, snapshot_from
from mlx_afm.training.schedule import depends_on_length

STATE = "training_state.safetensors"
FORMAT, VERSION = "mlx-afm training state", 1
# Settings that a resumed run may change: none of them moves a weight.
FREE = {"iters", "epochs", "save_every", "steps_per_report", "patience", "max_skipped_steps"}
FREE |= {"spike_sigmas", "spike_window", "rank_timeout_seconds"}

RunFingerprint = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SavedRun:
    """What the file says.

    Attributes:
        snapshot: the run itself.
        fingerprint: what decides where it goes; see `run_fingerprint`.
        total_steps: how many steps it was to have.
        metrics_bytes: length of `metrics.jsonl` when it was saved.
    """

    snapshot: Snapshot
    fingerprint: RunFingerprint
    total_steps: int
    metrics_bytes: int

    @property
    def step(self) -> int:
        """Steps done."""
        return self.snapshot.state.step


def run_fingerprint(train: TrainConfig, lora: LoRAConfig, sources: Mapping[str, str]) -> RunFingerprint:
    """What decides how a run goes: settings, adapter, and fingerprints of what it reads."""
    settings = {name: value for name, value in asdict(train).items() if name not in FREE}
    fingerprint = {"train": settings, "adapter": asdict(lora), "from": dict(sources)}
    known: RunFingerprint = json.loads(json.dumps(fingerprint))
    return known


def write_state(path: Path, run: SavedRun) -> None:
    """Writes the file atomically."""
    tensors = {
        **{f"weights.{name}": from_mlx(array) for name, array in run.snapshot.weights.items()},
        **{f"optimizer.{name}": from_mlx(array) for name, array in run.snapshot.optimizer.items()},
    }
    text = json.dumps(
        {
            "version": VERSION,
            "snapshot": run.snapshot.values(),
            "course": run.fingerprint,
            "total_steps": run.total_steps,
            "metrics_bytes": run.metrics_bytes,
        }
    )
    write_safetensors(path, tensors, {"format": FORMAT, "run": text, "crc32": _checksum(text, tensors, path)})


def read_state(path: Path) -> SavedRun:
    """The file, every byte checked.

    Raises:
        FormatError: no such file, cut, damaged, or of a later version.
    """
    values = read_run(path)
    tensors, metadata = read_safetensors(path), read_metadata(path)
    if _checksum(metadata["run"], tensors, path) != metadata.get("crc32"):
        raise FormatError("damaged: the checksum is not that of the content", where=path, advice=_START_ANEW)
    snapshot = snapshot_from(
        values.get("snapshot"), _part(tensors, "weights."), _part(tensors, "optimizer."), where=path
    )
    try:
        return SavedRun(snapshot, dict(values["course"]), int(values["total_steps"]), int(values["metrics_bytes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("not the state of a run", where=path, advice=_START_ANEW) from error


_START_ANEW = "Start anew without --resume, from this run's last adapter with --resume-adapter-file if it is whole."


def read_run(path: Path) -> dict[str, Any]:
    """The JSON of the file alone, without its tensors.

    Raises:
        FormatError: see `read_state`.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise FormatError("not the state of a run", where=path, expected=FORMAT, found=metadata.get("format"))
    try:
        values = json.loads(metadata["run"])
        version = values["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError("not the state of a run", where=path, advice=_START_ANEW) from error
    if version != VERSION:
        raise FormatError("a state of another version", where=path, expected=VERSION, found=version)
    return dict(values)


def _part(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): to_mlx(t) for name, t in tensors.items() if name.startswith(prefix)}


def _checksum(text: str, tensors: Mapping[str, LazyTensor], path: Path) -> str:
    value = zlib.crc32(text.encode())
    for name, tensor in tensors.items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), value)
        for piece in tensor.iter_bytes(path):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def require_same_run(
    saved: SavedRun, fingerprint: RunFingerprint, config: TrainConfig, total_steps: int, *, where: Path
) -> None:
    """Checks that a run may go on with these settings.

    Raises:
        ConfigError: something differs that would change the run; each difference is named.
    """
    differences = list(_differences(saved.fingerprint, fingerprint))
    if total_steps != saved.total_steps:
        differences += _length_difference(saved, config, total_steps)
    if differences:
        advice = (
            "Give what the run began with; or start a new run from its values: --resume-adapter-file FOLDER "
            "(another --adapter-path)."
        )
        raise ConfigError("cannot resume this run with other settings", where=where, advice=advice, details=differences)


def _differences(old: RunFingerprint, new: RunFingerprint) -> Iterable[str]:
    defaults = {**_defaults(TrainConfig), **_defaults(LoRAConfig)}
    for group, values in new.items():
        stored = old.get(group, {})
        for name in sorted({*values, *stored}):
            before = stored.get(name, defaults.get(name)) if group != "from" else stored.get(name, "none")
            after = values.get(name, "none" if group == "from" else None)
            if before != after and name not in FREE:
                yield f"{name}: the run has {_told(before)}, asked for {_told(after)}"


def _told(value: Any) -> str:
    """A fingerprint by its first digits; other values as they are."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _defaults(config: type[TrainConfig] | type[LoRAConfig]) -> dict[str, Any]:
    found = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    known: dict[str, Any] = json.loads(json.dumps(found))
    return known


def _length_difference(saved: SavedRun, config: TrainConfig, total_steps: int) -> list[str]:
    text = f"steps: the run has {saved.total_steps}, asked for {total_steps}"
    if depends_on_length(config):
        kind = f"{config.schedule} schedule" if config.schedule != "constant" else "warm-up as a share"
        return [f"{text}; with a {kind} every step's rate depends on how many there are"]
    return [] if total_steps >= saved.step else [f"{text}; {saved.step} are done"]


def fingerprint_of_data(splits: Mapping[str, Iterable[Tokens]]) -> dict[str, str]:
    """SHA-256 of the tokens and weights of each split: what is trained on, wherever it came from."""
    prints = {}
    for name, examples in splits.items():
        digest = hashlib.sha256()
        for tokens in examples:
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(tokens.ids.tobytes())
            digest.update(tokens.weights.tobytes())
        prints[f"{name} data"] = digest.hexdigest()
    return prints
