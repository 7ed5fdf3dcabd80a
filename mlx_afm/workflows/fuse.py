"""Merge an adapter into the weights: a plain model folder that needs no adapter.

Codes are never rounded anew. Of a quantized model either everything becomes dense, or the codes stay as
they are, bit for bit, and the adapter goes into the folder beside them, where it is active. What quantization-aware
training left becomes the codes it was trained with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.adapters import Adapter, attach_adapter, fuse_adapter, write_adapter_folder
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.finite import finite_while_read
from mlx_afm.checkpoints.mlx_checkpoint import BASE_ADAPTER, KEPT_FILES, OBSERVERS, write_config
from mlx_afm.checkpoints.quantized import to_quantization_json
from mlx_afm.errors import AdapterError, SettingError
from mlx_afm.files import atomic_folder, require_space, size_of, to_path, write_text
from mlx_afm.folders import new_folder
from mlx_afm.formats.mlx_folder import INDEX, shard_files, write_shards
from mlx_afm.formats.tensors import OnBytes
from mlx_afm.interop import write_shim
from mlx_afm.model import Model
from mlx_afm.model.projections import Quantized
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantizationPlan
from mlx_afm.text.hf_chat_template import hf_chat_template
from mlx_afm.text.system_prompt import SYSTEM_PROMPTS, default_system_prompt
from mlx_afm.training import Callback, StageProgress
from mlx_afm.training.hooks import ignore, notes_of

CHAT_TEMPLATE = "chat_template.jinja"
SPARE_BYTES = 8 << 20  # for headers, tokenizer, JSON
PROMPT_TOKENS = 32  # of the fixed prompt the difference is measured on


@dataclass(frozen=True)
class Fused:
    """What fusing did.

    Attributes:
        folder: where the result is.
        form: "dense", "codes" with the adapter beside them, or "trained codes" of quantization-aware training.
        difference: the largest change of a logit against the live adapter, on a fixed prompt, of the
            folder as it loads.
        effect: the largest change of a logit that the adapter makes there, to compare with.
    """

    folder: Path
    form: str
    difference: float
    effect: float


def fuse(
    model_path: str | Path,
    adapter_path: str | Path | None,
    save_path: str | Path,
    *,
    dequantize: bool = False,
    on_event: Callback = ignore,
) -> Fused:
    """Writes the model with the adapter added to its weights (in float32, rounded once to their dtype).

    The folder keeps the system prompts that the adapter was trained with, for `load` and for the chat template.

    Args:
        model_path: an MLX model folder.
        adapter_path: any of the three adapter forms; None fuses the folder's own `base_adapter`.
        save_path: the folder to write; it must not exist yet, or be empty.
        dequantize: make everything dense. Without it its codes are copied and the adapter is kept as
            the folder's `base_adapter`, which `load`, `generate` and `lora` apply.
        on_event: is given notices, and the progress of writing, in bytes.

    Raises:
        AdapterError: an adapter for another model, or nothing to fuse.
        TensorsError: NaN or infinite weights, also those that the sum has in a 16-bit dtype.
        ConfigError: a target in the way, or written by another process. DiskFullError: too little disk.
    """
    source, target = ModelFolder(model_path), to_path(save_path)
    with new_folder(target, "--save-path", notes_of(on_event)):
        return _fuse(source, adapter_path, target, dequantize=dequantize, on_event=on_event)


def _fuse(
    source: ModelFolder, adapter_path: str | Path | None, target: Path, *, dequantize: bool, on_event: Callback
) -> Fused:
    in_codes, where = bool(source.schemes), source.path
    adapter = source.active_base_adapter if adapter_path is None else source.open_adapter(adapter_path)
    if adapter is None:
        raise AdapterError("nothing to fuse", where=where, advice="Give --adapter-path.")
    if dequantize and not in_codes and adapter.config.fine_tune_type != "qat":
        raise SettingError("nothing to dequantize: the model is dense", where=where, advice="Leave dequantize out.")
    keeps_codes, made_codes = in_codes and not dequantize, adapter.config.fine_tune_type == "qat" and not dequantize
    if keeps_codes and adapter_path is None:
        advice = "It is active already. To merge it, make the model dense: fuse --dequantize."
        raise AdapterError("the base adapter of a quantized model stays beside its codes", where=where, advice=advice)
    model = source.load_model()
    plain = _logits(model)
    attach_adapter(model, adapter, where=adapter_path or source.path / BASE_ADAPTER)
    live = _logits(model)
    if not keeps_codes:
        fuse_adapter(model, dequantize=dequantize)
    weights = {} if keeps_codes else {name: from_mlx(array) for name, array in tree_flatten(model.parameters())}
    files = [file for file in (*shard_files(source.path), source.path / INDEX) if file.is_file()] if keeps_codes else []
    progress = _Progress(sum(map(size_of, files)) + sum(tensor.nbytes for tensor in weights.values()), on_event)
    wanted_bytes = progress.total + (_adapter_bytes(adapter) if keeps_codes else 0) + SPARE_BYTES
    require_space(target, wanted_bytes)
    with atomic_folder(target, wanted_bytes) as partial:
        settings = source.kept_settings
        if keeps_codes:
            settings.update({**source.quantization_settings, **_copy_codes(files, partial, adapter, progress.add)})
        else:
            write_shards(partial, finite_while_read(weights, where=target), on_bytes=progress.add)
            settings.update(_explained_codes(model, partial) if made_codes else {})
        # The toolkit's JSON, which names the base adapter, no longer holds.
        for name in (*KEPT_FILES, OBSERVERS):
            if (source.path / name).is_file():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.path / name, partial / name)
        if adapter_path is not None and adapter.system_prompts:
            settings[SYSTEM_PROMPTS] = list(adapter.system_prompts)
            _write_template(partial, default_system_prompt(adapter.system_prompts))
        write_config(partial, model.args, settings)
        del model, weights
        difference = _distance(_logits(ModelFolder(partial).load_with(None)), live)
    form = "codes" if keeps_codes else "trained codes" if made_codes else "dense"
    return Fused(target, form, difference, _distance(plain, live))


class _Progress:
    """Adds up the bytes written and tells of them."""

    def __init__(self, total: int, on_event: Callback) -> None:
        self.done, self.total, self.on_event = 0, total, on_event

    def add(self, count: int) -> None:
        self.done += count
        self.on_event(StageProgress(stage="fusing", done=self.done, total=self.total, unit="bytes"))


def _adapter_bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.weights.values())


def _copy_codes(files: Sequence[Path], partial: Path, adapter: Adapter, on_bytes: OnBytes) -> dict[str, str]:
    """Copies the weights as they are and puts the adapter beside them."""
    for file in files:
        shutil.copyfile(file, partial / file.name)
        on_bytes(size_of(file))
    write_adapter_folder(partial / BASE_ADAPTER, adapter)
    return write_shim(partial)


def _write_template(partial: Path, system: str | None) -> None:
    """Gives the template for other programs, if the folder has one, the system prompt of the adapter."""
    tokenizer, template = ModelFolder(partial).tokenizer, partial / CHAT_TEMPLATE
    if tokenizer is not None and template.is_file():
        write_text(template, hf_chat_template(tokenizer.convert_ids_to_tokens(tokenizer.eos_id), system))


def _explained_codes(model: Model, partial: Path) -> dict[str, Any]:
    """What `config.json` has to say of a model's codes."""
    schemes = {path: module.scheme for path, module in model.named_modules() if isinstance(module, Quantized)}
    kinds = list(schemes.values())
    plan = QuantizationPlan(max(set(kinds), key=kinds.count), schemes, ())
    return {"quantization": to_quantization_json(plan), **write_shim(partial)}


def _logits(model: Model) -> mx.array:
    """Logits of a prompt that depends on nothing but the size of the vocabulary."""
    tokens = (mx.arange(PROMPT_TOKENS) * 7919 + 1) % model.args.vocab_size
    logits = model(tokens[None]).astype(mx.float32)
    mx.eval(logits)
    return logits


def _distance(first: mx.array, second: mx.array) -> float:
    return float(mx.abs(first - second).max().item())  # type: ignore[arg-type]
