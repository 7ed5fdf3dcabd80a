"""What the library keeps to save time: encoded data, and activations of frozen layers. Deleting it loses no result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.data.read import ENCODED, META, cache_folder
from mlx_afm.errors import ConfigError
from mlx_afm.files import remove, size_of
from mlx_afm.runs.activation_store import STORES, list_stores

DAY_SECONDS = 86400


@dataclass(frozen=True)
class CacheEntry:
    """A thing that is kept.

    Attributes:
        name: by which it can be deleted.
        kind: "encoded data" or "frozen activations".
        size_bytes: on disk.
        days: since it was last used.
        about: what it is of, in words.
        path: its folder.
    """

    name: str
    kind: str
    size_bytes: int
    days: float
    about: str
    path: Path


def list_cache() -> list[CacheEntry]:
    """Everything that is kept, the largest first."""
    folder, now = cache_folder(), time.time()
    entries = []
    for store in list_stores(folder / STORES):
        about = f"{store['examples']:,} examples behind {(store['about'] or {}).get('layers', '?')} layers"
        days = (now - store["changed"]) / DAY_SECONDS
        path = folder / STORES / store["name"]
        entries.append(CacheEntry(store["name"], "frozen activations", store["bytes"], days, about, path))
    for path in (folder / ENCODED).glob("*"):
        if (path / META).is_file():
            days = (now - (path / META).stat().st_mtime) / DAY_SECONDS
            entries.append(CacheEntry(path.name, "encoded data", size_of(path), days, "token ids of a split", path))
    return sorted(entries, key=lambda entry: -entry.size_bytes)


def clear_cache(names: Sequence[str] = (), older_than_days: float = 0.0) -> list[CacheEntry]:
    """Deletes entries, and gives what was deleted. A run that uses one goes on and computes what it lacks.

    Args:
        names: of the entries, or the beginnings of their names; none for all.
        older_than_days: leave those that were used since.

    Raises:
        ConfigError: a name that is no entry's, or several entries'.
    """
    entries = list_cache()
    chosen = entries
    if names:
        found = {name: [entry for entry in entries if entry.name.startswith(name)] for name in names}
        if wrong := [f"{name}: {len(fitting)} entries" for name, fitting in found.items() if len(fitting) != 1]:
            advice = "mlx-afm cache list shows the names."
            raise ConfigError("names of no single entry", where=cache_folder(), advice=advice, details=wrong)
        chosen = list(dict.fromkeys(fitting[0] for fitting in found.values()))
    chosen = [entry for entry in chosen if entry.days >= older_than_days]
    for entry in chosen:
        remove(entry.path)
    return chosen
