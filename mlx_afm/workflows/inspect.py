"""Say what a file or folder is and what is in it, reading headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_afm.adapters import read_adapter
from mlx_afm.adapters.store import CONFIG as ADAPTER_CONFIG
from mlx_afm.checkpoints.mlx_checkpoint import BASE_ADAPTER, OBSERVERS, TOOLKIT_CONFIG
from mlx_afm.checkpoints.names import adapter_ids, count_layers
from mlx_afm.checkpoints.quantized import bits_per_weight, count_values
from mlx_afm.checkpoints.toolkit import STEMS, find_toolkit_files
from mlx_afm.errors import FormatError
from mlx_afm.files import read_json, to_path, visible
from mlx_afm.formats.fmadapter import read_fmadapter
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import TorchFile, read_torch_checkpoint
from mlx_afm.model import AFMConfig, parse_toolkit_config
from mlx_afm.model_folder import ModelFolder
from mlx_afm.text.tokenizer import AFMTokenizer

AFM_BASE_PARAMETERS = 3_111_368_064
AFM_LORA_PARAMETERS = 66_633_728
KNOWN_COUNTS = {
    AFM_BASE_PARAMETERS + AFM_LORA_PARAMETERS: "AFM text v7 with its adapter, 3.18 B parameters",
    AFM_BASE_PARAMETERS: "AFM text v7, base weights alone",
    AFM_LORA_PARAMETERS: "a rank-32 adapter for AFM text v7",
    48_765_952: "the draft model of AFM text v7",
}


def inspect(path: str | Path) -> dict[str, Any]:
    """A description of any file or folder the library knows: `kind`, and what belongs to that kind.

    Raises:
        FormatError: nothing there, something unknown, or damaged; with the reason.
    """
    path = to_path(path)
    if not path.exists():
        raise FormatError("no such file or folder", where=path)
    describe = _folder if path.is_dir() else _file
    return {"path": str(path), **describe(path)}


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        checkpoint = read_torch_checkpoint(path)
        of_adapter = all("adapter" in name for name in checkpoint.tensors)
        kind = "toolkit adapter checkpoint" if of_adapter else "torch checkpoint"
        return {"kind": kind, **_torch_summary(checkpoint), "adapter_ids": adapter_ids(list(checkpoint.tensors))}
    if path.suffix == ".safetensors":
        return {"kind": "safetensors file", **_summary(read_safetensors(path))}
    if path.suffix == ".model":
        tokenizer = AFMTokenizer.from_file(path)
        return {
            "kind": "SentencePiece tokenizer",
            "vocab_size": tokenizer.vocab_size,
            "special_pieces": list(tokenizer.special_pieces),
        }
    if path.suffix == ".json":
        values = read_json(path)
        if isinstance(values, dict) and "model_type" in values:
            return {"kind": "MLX model configuration", "model": AFMConfig.from_dict(values).to_dict()}
        config = parse_toolkit_config(values, where=path)
        return {"kind": "toolkit model configuration", "model": config.model.to_dict()}
    if path.suffix == ".jsonl":
        with path.open("rb") as handle:
            return {"kind": "training data", "lines": sum(bool(line.strip()) for line in handle)}
    raise FormatError("an unknown kind of file", where=path, expected=".pt, .safetensors, .model, .json or .jsonl")


def _folder(path: Path) -> dict[str, Any]:
    if path.suffix == ".fmadapter":
        metadata, geometry, tensors = read_fmadapter(path)
        return {
            "kind": "adapter package",
            "identifier": metadata.identifier,
            "rank": metadata.rank,
            "author": metadata.author,
            "description": metadata.description,
            "layers": [geometry.ordinary_layers, geometry.reuse_layers],
            **_summary(tensors),
        }
    if (path / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(path)
        return {
            "kind": "MLX adapter folder",
            "fine_tune_type": adapter.config.fine_tune_type,
            "layers": adapter.config.layers,
            "rank": adapter.config.rank,
            "scale": adapter.config.scale,
            "targets": list(adapter.config.targets),
            **_summary(adapter.weights),
        }
    if (path / "config.json").is_file():
        return _model_folder(path)
    if any((folder / f"{stem}.pt").is_file() for folder in (path, path / "assets") for stem in STEMS):
        files = find_toolkit_files(path)
        config = parse_toolkit_config(read_json(files.config), where=files.config)
        return {
            "kind": "toolkit folder",
            "model": config.model.to_dict(),
            "adapter": config.adapter.name if config.adapter else None,
            "tokenizer": files.tokenizer is not None,
            **_torch_summary(read_torch_checkpoint(files.weights)),
        }
    if data_files := visible(path.glob("*.jsonl")):
        lines = {file.name: _file(file)["lines"] for file in data_files}
        return {"kind": "training data folder", "lines": lines}
    raise FormatError(
        "an unknown kind of folder", where=path, expected="a toolkit, model, adapter or data folder, or a .fmadapter"
    )


def _model_folder(path: Path) -> dict[str, Any]:
    folder = ModelFolder(path)
    return {
        "kind": "MLX model folder",
        "model": folder.config.to_dict(),
        "tokenizer": folder.tokenizer_file is not None,
        "base_adapter": (path / BASE_ADAPTER).is_dir(),
        "observers": (path / OBSERVERS).is_file(),
        "toolkit_config": (path / TOOLKIT_CONFIG).is_file(),
        **_quantization(folder),
    }


def _quantization(folder: ModelFolder) -> dict[str, Any]:
    """The summary of a model's weights; codes count as the values they stand for."""
    tensors, schemes = folder.tensors, folder.schemes
    summary = _summary(tensors)
    if schemes:
        values = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
        parameters = count_values(values, schemes)
        forms = Counter(str(scheme) for scheme in schemes.values())
        summary.update({"parameters": parameters, "recognised": KNOWN_COUNTS.get(parameters)})
        summary.update({"quantization": dict(forms), "bits_per_weight": round(bits_per_weight(tensors, schemes), 4)})
    return summary


def _torch_summary(checkpoint: TorchFile) -> dict[str, Any]:
    return {"form": checkpoint.form, "wrapper_key": checkpoint.wrapper_key, **_summary(checkpoint.tensors)}


def _summary(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Counts over distinct storages: the head is the embedding and is not counted twice."""
    unique = {name: tensor for name, tensor in tensors.items() if name != "output_transform.weight"}
    state = (".range", ".num_samples", "_scale")
    parameters = sum(tensor.size for name, tensor in unique.items() if not name.endswith(state))
    ordinary, reuse = count_layers(list(unique))
    return {
        "tensors": len(tensors),
        "parameters": parameters,
        "recognised": KNOWN_COUNTS.get(parameters),
        "bytes": sum(tensor.nbytes for tensor in unique.values()),
        "dtypes": dict(sorted(Counter(tensor.dtype for tensor in unique.values()).items())),
        "ordinary_layers": ordinary,
        "kv_reuse_layers": reuse,
    }
