"""Where the commands of Apple's adapter training toolkit find their model, and in which precision.

The toolkit's `assets/` is converted once, into the user's cache folder (or `$MLX_AFM_TOOLKIT_CACHE/DTYPE`), and again
when a file in it changed. Nothing is written into the toolkit's own folder. By default the assets are the folder
`assets` in the current folder, since the toolkit is run from its own folder. What is done with the model is in
`toolkit_train` and `toolkit_generate`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.checkpoints.toolkit import find_toolkit_files
from mlx_afm.data import cache_folder
from mlx_afm.errors import ConfigError
from mlx_afm.files import read_json, to_optional_path, to_path, write_json
from mlx_afm.folders import OnNote, ignore_note
from mlx_afm.training import Event, Notice
from mlx_afm.workflows.convert import OnProgress, convert

ASSETS_VARIABLE, CACHE_VARIABLE = "MLX_AFM_TOOLKIT_ASSETS", "MLX_AFM_TOOLKIT_CACHE"
BESIDE = "mlx-afm"
MADE_FROM = "made-from.json"


@dataclass(frozen=True)
class Precision:
    """What one of the toolkit's precisions means here: dtype of the base, and what to tell the user of it.

    The adapter, its gradients and the optimizer are float32 always.
    """

    dtype: str
    note: str


PRECISIONS = {
    "f32": Precision("float32", "f32: base and adapter in float32"),
    "bf16-mixed": Precision(
        "bfloat16",
        "bf16-mixed: the frozen base in bfloat16, half the toolkit's memory; the adapter and sums in float32",
    ),
    "f16-mixed": Precision(
        "float16",
        "f16-mixed: the frozen base in float16, the adapter and sums in float32; bf16-mixed has more range",
    ),
    "bf16": Precision(
        "bfloat16",
        "bf16: treated as bf16-mixed, with the adapter in float32, since adapters trained in pure bfloat16 degenerate",
    ),
}


def find_assets(given: str | Path | None) -> Path:
    """The folder of the toolkit's assets: the one given, else `$MLX_AFM_TOOLKIT_ASSETS`, else `./assets`.

    Raises:
        ConfigError: no such folder.
    """
    given = to_optional_path(given)
    named = os.environ.get(ASSETS_VARIABLE)
    assets = given or (to_path(named) if named else Path("assets"))
    if not assets.is_dir():
        advice = f"Run in the toolkit's folder, or give --assets FOLDER or ${ASSETS_VARIABLE}."
        raise ConfigError("no assets", where=assets, expected="the toolkit's assets folder", advice=advice)
    return assets


def model_folder(
    assets: str | Path,
    precision: str,
    *,
    on_note: OnNote = ignore_note,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """The MLX folder of the toolkit's base model, converted if it is not there yet.

    Args:
        assets: the toolkit's assets.
        precision: a key of `PRECISIONS`.
        on_note: told of a conversion, and where it goes.
        on_progress: see `convert`.

    Raises:
        FormatError, ConfigError, TensorsError: see `convert`.

    Cost: the first time, disk for the model: 6.4 GB in 16 bits, 12.7 GB in float32.
    """
    assets = to_path(assets)
    dtype = PRECISIONS[precision].dtype
    files = find_toolkit_files(assets)
    sources = [path for path in (files.weights, files.config, files.tokenizer) if path is not None]
    made_from = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    named = os.environ.get(CACHE_VARIABLE)
    earlier = files.weights.absolute().parent.parent / BESIDE  # where the first releases put it
    places = [to_path(named)] if named else [earlier, _cache_of(files.weights)]
    for folder in (place / dtype for place in places):
        if (folder / MADE_FROM).is_file() and read_json(folder / MADE_FROM) == made_from:
            return folder
    on_note(f"converting {files.weights} to {folder}, once")
    if folder.exists():
        _require_ours(folder)
        shutil.rmtree(folder)

    def tell(event: Event) -> None:
        if isinstance(event, Notice):
            on_note(event.text)

    convert(files.weights, folder, dtype=dtype, on_progress=on_progress, on_event=tell)
    write_json(folder / MADE_FROM, made_from)
    return folder


def _cache_of(weights: Path) -> Path:
    """The folder for the conversions of one toolkit, told by its path: nothing is written into the toolkit's folder."""
    place = str(weights.resolve().parent)
    return cache_folder() / "toolkit" / hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:16]


def _require_ours(folder: Path) -> None:
    if not ((folder / MADE_FROM).is_file() or (folder / "config.json").is_file()):
        advice = f"Move it, or choose another place with ${CACHE_VARIABLE}."
        raise ConfigError("in the way of the converted model", where=folder, advice=advice)
