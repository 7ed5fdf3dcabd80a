"""Where an adapter comes from, in a few hashes that travel with its package: settings, data, base model, library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_afm._version import __version__
from mlx_afm.adapters.store import CONFIG, WEIGHTS
from mlx_afm.files import fingerprint_of_files, read_json, visible
from mlx_afm.formats.fmadapter import SUFFIX
from mlx_afm.model_folder import ModelFolder

SOURCES, BASE_SOURCE = "sources", "base model"  # keys of `adapter_config.json`, and of its sources
START_SOURCE = "adapter to start from"
SETTINGS = ("fine_tune_type", "lora_parameters", "trained_targets", "trained_layers", "train")


def lineage_of(adapter: Path, model: ModelFolder | None) -> dict[str, str]:
    """What is known of an adapter's origin; what is not known is left out.

    Args:
        adapter: any form. A folder that `mlx-afm lora` wrote says most.
        model: the base model; its fingerprint is taken if the adapter does not carry it.

    Returns:
        `library`, its name and version; SHA-256 in hex: `training` of the settings, `data` of what was
        trained on, `base_model` of the base model's files (sampled, see `fingerprint_of_files`).
    """
    path = adapter / CONFIG
    values = read_json(path) if adapter.suffix != SUFFIX and path.is_file() else {}
    values = values if isinstance(values, Mapping) else {}
    sources = values.get(SOURCES)
    sources = sources if isinstance(sources, Mapping) else {}
    data = {name: value for name, value in sources.items() if name.endswith(" data")} or values.get("data")
    base = sources.get(BASE_SOURCE)
    if base is None and model is not None:
        base = model.fingerprint
    known = {
        "library": f"mlx-afm {__version__}",
        "training": _hash({name: values.get(name) for name in SETTINGS}) if "train" in values else None,
        "data": _hash(data) if data else None,
        "base_model": base,
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def adapter_fingerprint(path: Path) -> str:
    """SHA-256 that names an adapter of any form by its files; a run's other files do not count."""
    names = [path / CONFIG, path / WEIGHTS] if path.is_dir() and path.suffix != SUFFIX else path.rglob("*")
    files = [path] if path.is_file() else [file for file in visible(names) if file.is_file()]
    return fingerprint_of_files(files)


def base_differs(adapter: Path, model: ModelFolder) -> bool:
    """Whether an adapter says that it was trained on another base model than the one in a folder."""
    path = adapter / CONFIG
    values = read_json(path) if adapter.suffix != SUFFIX and path.is_file() else {}
    sources = values.get(SOURCES) if isinstance(values, Mapping) else None
    trained_on = sources.get(BASE_SOURCE) if isinstance(sources, Mapping) else None
    return trained_on is not None and trained_on != model.fingerprint


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
