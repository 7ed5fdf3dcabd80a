"""The weights of an mlx-lm model folder: safetensors shards and their index.

One shard is `model.safetensors`; several are `model-00001-of-00007.safetensors` and so on. The index
`model.safetensors.index.json` is {"metadata": {"total_size"}, "weight_map": {tensor: file}}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mlx_afm.errors import FormatError
from mlx_afm.files import OpenFiles, write_json
from mlx_afm.formats.safetensors_file import read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor, OnBytes, ignore_bytes

MAX_SHARD_BYTES = 5 << 30
MAX_SHARDS = 10_000  # a name that calls for more is not taken for one of a series
SHOWN = 10  # missing files named
INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"model-\d{5}-of-(?P<count>\d{5})\.safetensors", re.ASCII)


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names in order, cut into shards of at most the given size (a larger tensor has its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: OnBytes = ignore_bytes,
    ahead: bool = True,
) -> None:
    """Writes shards and index into a folder; `on_bytes` and `ahead` as in `write_safetensors`."""
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names}, {"format": "mlx"}, on_bytes, ahead)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def shard_files(folder: Path, opened: OpenFiles | None = None) -> list[Path]:
    """The weight files of a folder, in order.

    Raises:
        FormatError: there are none, or a shard is missing that the index or the names of the others call for.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FormatError("no weights", where=folder, expected="model*.safetensors", advice="Is this a model folder?")
    present = {file.name for file in files}
    wanted = _indexed_files(folder, opened or OpenFiles()) | _numbered_files(present)
    missing = sorted(wanted - present)
    if missing:
        expected, found = f"{len(wanted)} files", f"{len(wanted) - len(missing)}"
        advice = "Copy or download the folder again, all of it."
        details = missing[:SHOWN] + [f"... and {len(missing) - SHOWN} more"] * (len(missing) > SHOWN)
        raise FormatError(
            "weight files are missing", where=folder, expected=expected, found=found, advice=advice, details=details
        )
    return files


def _indexed_files(folder: Path, opened: OpenFiles) -> set[str]:
    """The files that the index names; none without an index."""
    path = folder / INDEX
    if not path.is_file():
        return set()
    index = opened.read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError("not an index of weights", where=path, expected="weight_map, from tensor to file")
    return set(weight_map.values())


def _numbered_files(names: set[str]) -> set[str]:
    """All files of the series that some names belong to: model-00002-of-00003 calls for 1 and 3."""
    counts = {int(match["count"]) for name in names if (match := _NUMBERED.fullmatch(name))}
    return {
        f"model-{number:05}-of-{count:05}.safetensors"
        for count in counts
        if count <= MAX_SHARDS
        for number in range(1, count + 1)
    }


def read_shards(folder: Path, opened: OpenFiles | None = None) -> dict[str, LazyTensor]:
    """All tensors of a folder, memory-mapped.

    Args:
        folder: the folder.
        opened: keeps its files open for others, or has them open.

    Raises:
        FormatError: no weights, a damaged file, or a name that occurs in two files.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in shard_files(folder, opened):
        for name, tensor in read_safetensors(file, opened).items():
            if name in tensors:
                raise FormatError(f"tensor {name} occurs in two files", where=file)
            tensors[name] = tensor
    return tensors
