"""Toolkit folder -> MLX folder, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_afm.adapters import Adapter, LoRAConfig, write_adapter_folder
from mlx_afm.checkpoints.arrays import FLOAT_DTYPES
from mlx_afm.checkpoints.model_folder import (
    BASE_ADAPTER,
    model_tensors,
    read_config,
    write_model_folder,
    write_toolkit_parts,
    write_torch_checkpoint,
)
from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.checkpoints.toolkit import ToolkitCheckpoint, ToolkitFiles, find_toolkit_files, read_toolkit_checkpoint
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import atomic_folder
from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.load import base_adapter


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        folder: where the result is.
        form: "mlx" or "torch".
        tensors: tensors written (the head's alias not counted).
        base_adapter: "none", "zero" or "active": whether the base carries an adapter that does something.
    """

    folder: Path
    form: str
    tensors: int
    base_adapter: str


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "mlx",
    dtype: str | None = None,
    no_tokenizer: bool = False,
    on_file: Callable[[str], None] = lambda name: None,
) -> Converted:
    """Converts a model between the toolkit's form and MLX's.

    Args:
        source: a toolkit folder, its `assets`, or a `.pt` beside its JSON (for "mlx"); an MLX folder
            (for "torch").
        target: the folder to write; it must not exist yet, or be empty.
        to: "mlx" or "torch".
        dtype: float32, bfloat16 or float16 for the weights; None keeps the source's. Adapters and
            quantiser steps stay float32.
        no_tokenizer: convert a folder that lacks `tokenizer.model`.
        on_file: told what is being written.

    Raises:
        FormatError: a part missing or damaged. ConfigError: a model that is not AFM text v7, an
            unknown setting, or a target in the way. TensorsError: tensors of another model.

    The target appears when it is complete, or not at all.
    """
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError("unknown dtype", expected=" or ".join(FLOAT_DTYPES), found=dtype)
    if to not in ("mlx", "torch"):
        raise ConfigError("unknown form", where="to", expected="mlx or torch", found=to)
    _require_free(target)
    if to == "torch":
        return _to_torch(source, target, dtype, on_file)
    if (source / "config.json").is_file() and not source.suffix == ".pt":
        raise ConfigError(
            "already an MLX folder", where=source, advice="Use --to torch to go back to the toolkit's form."
        )
    files = find_toolkit_files(source)
    if files.tokenizer is None and not no_tokenizer:
        advice = "Put the toolkit's tokenizer.model beside the checkpoint, or pass --no-tokenizer to go without."
        raise FormatError("missing tokenizer.model", where=files.weights.parent, advice=advice)
    return _to_mlx(files, target, dtype, on_file)


def _require_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("the target exists already", where=target, advice="Remove it or choose another --mlx-path.")


def _to_mlx(files: ToolkitFiles, target: Path, dtype: str | None, on_file: Callable[[str], None]) -> Converted:
    checkpoint = read_toolkit_checkpoint(files)
    tensors = model_tensors(checkpoint, dtype)
    ids = {} if files.tokenizer is None else _token_ids(files.tokenizer, checkpoint)
    with atomic_folder(target) as partial:
        on_file("weights")
        dtype_name = next(iter(tensors.values())).dtype
        write_model_folder(partial, checkpoint.config.model, tensors, torch_dtype=dtype_name, **ids)
        write_toolkit_parts(partial, checkpoint)
        if files.tokenizer is not None:
            on_file("tokenizer")
            write_hf_tokenizer(files.tokenizer, partial)
        adapter = _adapter_of(checkpoint)
        if adapter is not None:
            on_file("base adapter")
            write_adapter_folder(partial / BASE_ADAPTER, adapter)
    return Converted(target, "mlx", len(tensors), _activity(adapter))


def _token_ids(file: Path, checkpoint: ToolkitCheckpoint) -> dict[str, object]:
    tokenizer = AFMTokenizer.from_file(file)
    rows = checkpoint.config.model.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            "the tokenizer does not belong to this model",
            where=file,
            expected=f"at most {rows} pieces",
            found=tokenizer.vocab_size,
        )
    # mlx-lm stops at any of these.
    return {"eos_token_id": [tokenizer.turn_end_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}


def _adapter_of(checkpoint: ToolkitCheckpoint) -> Adapter | None:
    spec = checkpoint.config.adapter
    if spec is None:
        return None
    entries = [entry for entry in plan_names(checkpoint.config) if entry.kind is Kind.ADAPTER]
    weights = {entry.ours: checkpoint.tensors[entry.toolkit] for entry in entries}
    return Adapter(LoRAConfig(rank=spec.rank, scale=spec.scale), checkpoint.config.model, weights, spec.name)


def _activity(adapter: Adapter | None) -> str:
    from mlx_afm.adapters import is_zero

    return "none" if adapter is None else "zero" if is_zero(adapter) else "active"


def _to_torch(source: Path, target: Path, dtype: str | None, on_file: Callable[[str], None]) -> Converted:
    read_config(source)
    adapter = base_adapter(source)
    with atomic_folder(target) as partial:
        on_file("base-model.pt")
        config = write_torch_checkpoint(source, partial, {} if adapter is None else adapter.weights, dtype)
        if (source / "tokenizer.model").is_file():
            (partial / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    count = sum(entry.kind is not Kind.ALIAS for entry in plan_names(config))
    return Converted(target, "torch", count, _activity(adapter))
