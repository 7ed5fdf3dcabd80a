"""The toolkit's folders: a torch checkpoint, its JSON, a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.errors import ConfigError, FormatError, TensorsError
from mlx_afm.files import read_json
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch_checkpoint
from mlx_afm.model import ToolkitConfig, parse_toolkit_config
from mlx_afm.tree import require_same_tensors

STEMS = ("base-model", "draft-model")


@dataclass(frozen=True)
class ToolkitFiles:
    """Where the parts of a toolkit checkpoint are.

    Attributes:
        weights: the `.pt`.
        config: its JSON.
        tokenizer: `tokenizer.model`, or None if there is none.
    """

    weights: Path
    config: Path
    tokenizer: Path | None


@dataclass(frozen=True)
class ToolkitCheckpoint:
    """A toolkit checkpoint whose names and shapes were checked; values are still on disk.

    Attributes:
        config: what the JSON says.
        config_text: its bytes, kept for the way back.
        tensors: the state dict by the toolkit's names.
        wrapper_key: the key of a larger checkpoint that the state dict was found under, or None.
    """

    config: ToolkitConfig
    config_text: bytes
    tensors: Mapping[str, LazyTensor]
    wrapper_key: str | None = None


def find_toolkit_files(source: Path, config: Path | None = None) -> ToolkitFiles:
    """The files of a toolkit folder, of its `assets`, or around a lone `.pt`.

    Args:
        source: folder or `.pt`. In a folder with both models, the base model; the draft model is
            reached by its own `.pt`.
        config: the JSON, if it does not lie beside the weights.

    Raises:
        FormatError: nothing there, or a part missing; every missing part is named.
    """
    if source.suffix == ".pt":
        weights = source
    else:
        folders = [source, source / "assets"]
        candidates = [folder / f"{stem}.pt" for folder in folders for stem in STEMS]
        present = [path for path in candidates if path.is_file()]
        if not present:
            # A folder that has the JSON or the tokenizer but no weights is a toolkit folder with a hole.
            raise FormatError(
                "no toolkit checkpoint",
                where=source,
                expected="base-model.pt, or assets/base-model.pt",
                advice="Give the toolkit's folder, its assets folder, or the .pt itself.",
            )
        weights = present[0]
    config = config or weights.with_name(f"{weights.stem}-config.json")
    missing = [path.name for path in (weights, config) if not path.is_file()]
    if missing:
        raise FormatError(
            f"missing {' and '.join(missing)}",
            where=weights.parent,
            advice="The checkpoint and its JSON lie side by side in the toolkit's assets folder.",
        )
    tokenizer = weights.with_name("tokenizer.model")
    return ToolkitFiles(weights, config, tokenizer if tokenizer.is_file() else None)


def read_toolkit_checkpoint(files: ToolkitFiles) -> ToolkitCheckpoint:
    """Opens a checkpoint and checks every name and shape against its configuration.

    Raises:
        FormatError: a damaged file. ConfigError: the JSON cannot be honoured.
        TensorsError: missing, surplus or misshaped tensors, all listed; or a head that is not the embedding.
    """
    config = parse_toolkit_config(read_json(files.config), where=files.config)
    file = read_torch_checkpoint(files.weights)
    tensors = file.tensors
    entries = plan_names(config)
    expected = {entry.toolkit: entry.shape for entry in entries}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    advice = f"Does {files.config.name} belong to this checkpoint?"
    require_same_tensors(expected, found, where=files.weights, advice=advice)
    for entry in entries:
        if entry.kind is Kind.ALIAS:
            _require_same_values(tensors["embedding.weight"], tensors[entry.toolkit], entry.toolkit, files.weights)
    return ToolkitCheckpoint(config, files.config.read_bytes(), tensors, file.wrapper_key)


def _require_same_values(embedding: LazyTensor, head: LazyTensor, name: str, where: Path) -> None:
    first, second = embedding.read_stored(), head.read_stored()
    same_storage = first.__array_interface__["data"][0] == second.__array_interface__["data"][0]
    if embedding.dtype != head.dtype or not (same_storage or embedding.same_stored(head)):
        raise TensorsError(
            f"{name} is not embedding.weight",
            where=where,
            advice="AFM text v7 ties its head to its embedding; a model with its own head cannot be converted.",
        )


def quantizer_scale(observer_range: npt.NDArray[Any], *, where: object = None) -> np.float32:
    """Step of the fake quantizer that an observer's (min, max) implies, float32.

    Shapes: observer_range (2,), numbers and never bit patterns: see `LazyTensor.read_values`.

    Raises:
        ConfigError: the range is empty or not finite, so that the step would not be positive.
    """
    low, high = observer_range.astype(np.float32)
    scale = np.maximum(low * np.float32(-1 / 128), high * np.float32(1 / 127))
    if not (np.isfinite(scale) and scale > 0):
        what, found = "a key or value quantizer without a usable range", (float(low), float(high))
        raise ConfigError(what, where=where, expected="a finite minimum and maximum, not both 0", found=found)
    return np.float32(scale)


def range_of_scale(scale: Any, *, where: object = None) -> npt.NDArray[np.float32]:
    """A (min, max) that implies exactly this step: (-128, at most 127) steps, float32.

    Raises:
        ConfigError: a step that is not positive or not finite.
    """
    step = np.float32(scale)
    if not (np.isfinite(step) and step > 0):
        what = "a key or value quantizer without a usable step"
        raise ConfigError(what, where=where, expected="a finite number above 0", found=float(step))
    high = np.float32(127) * step
    while high * np.float32(1 / 127) > step:
        high = np.nextafter(high, np.float32(0))
    return np.array([np.float32(-128) * step, high], np.float32)
