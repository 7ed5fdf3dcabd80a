"""Keys and values of a prompt in a file.

A `.safetensors` file of ours holds

    ids                      int32 (S,)        the prompt
    keys.N, values.N         (1, K, S, E)      of ordinary layer N; int8 in an int8 cache
    __metadata__             "format": "mlx-afm prompt cache 1", "fingerprint": of model and adapter
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm.checkpoints.arrays import from_mlx, to_mlx
from mlx_afm.errors import ConfigError, FormatError, SettingError
from mlx_afm.files import to_path
from mlx_afm.formats.safetensors_file import read_metadata, read_safetensors, write_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.generation.prefix_cache import PrefixCache, PromptCache, prefix_owner
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import require_token_ids

FORMAT = "mlx-afm prompt cache 1"
SAMPLED_VALUES = 1024  # of each tensor, for the fingerprint


def fingerprint(model: Model) -> str:
    """Hex digest that tells models and adapters apart: names, shapes and dtypes, and values all over each tensor.

    Cost: `SAMPLED_VALUES` of each tensor are read, not all of it.
    """
    digest = sha256(repr(model.args).encode())
    for name, array in sorted(tree_flatten(model.parameters())):
        flat = array.reshape(-1)
        sample = flat[:: max(1, math.ceil(flat.size / SAMPLED_VALUES))]
        exact = sample.astype(mx.float32) if mx.issubdtype(sample.dtype, mx.floating) else sample
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode() + np.array(exact).tobytes())
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if isinstance(scale := getattr(module, "scale", None), float):
            digest.update(f"{name} {scale!r}\n".encode())
    return digest.hexdigest()


def save_prompt_cache(path: str | Path, cache: PromptCache, model: Model) -> None:
    """Writes a prompt's keys and values, whole or not at all.

    Raises:
        ConfigError: the file's name ends otherwise than in `.safetensors`.
    """
    path = to_path(path)
    _require_name(path)
    tensors = {"ids": mx.array(cache.ids, mx.int32)}
    for number, layer in enumerate(cache.layers):
        assert layer.keys is not None
        assert layer.values is not None
        tensors[f"keys.{number}"] = layer.keys[..., : len(cache.ids), :]
        tensors[f"values.{number}"] = layer.values[..., : len(cache.ids), :]
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model)}
    write_safetensors(path, {name: from_mlx(array) for name, array in tensors.items()}, metadata=metadata)


def load_prompt_cache(path: str | Path, model: Model, *, quantized: bool = False) -> PromptCache:
    """A prompt's keys and values from a file.

    Args:
        path: from `save_prompt_cache`.
        model: with its adapter, that which they were computed with.
        quantized: in int8, as they were saved then.

    Raises:
        FormatError: no such file, or none of this form.
        ConfigError: of another model or adapter, or of the other kind of cache.
    """
    path = to_path(path)
    _require_name(path)
    metadata, tensors = read_metadata(path), read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise FormatError("not a prompt cache", where=path, expected=FORMAT, found=metadata.get("format"))
    if "ids" not in tensors or tensors["ids"].dtype != "int32" or len(tensors["ids"].shape) != 1:
        raise FormatError("a prompt cache without ids", where=path, expected="int32 (S,)")
    advice = "It is of use with the model and adapter it was made with alone; remove it, or name another file."
    if metadata.get("fingerprint") != fingerprint(model):
        raise ConfigError("a prompt cache of another model or adapter", where=path, advice=advice)
    ids = _checked_ids(tensors["ids"].read_values(), model, path)
    layers = model.make_cache(quantized=quantized)
    for number, layer in enumerate(layers):
        keys, values = (_held(path, model, tensors, f"{name}.{number}", len(ids)) for name in ("keys", "values"))
        if {keys.dtype == mx.int8, values.dtype == mx.int8} != {quantized}:
            found = "the dtype of the model" if quantized else "8 bits"
            raise ConfigError("a prompt cache of the other kind", where=path, found=found, advice=advice)
        layer.state = (keys, values, len(ids))
    return PromptCache(ids, layers)


@contextmanager
def prompt_cache_file(path: str | Path, model: Model, *, kv_bits: int | None = None) -> Iterator[PrefixCache]:
    """A prefix cache that begins with what a file holds; without the file, the last prompt is left in it.

    Raises:
        FormatError, ConfigError: see `load_prompt_cache`.
    """
    path = to_path(path)
    _require_name(path)
    kind, known, prefixes = prefix_owner(kv_bits=kv_bits), path.exists(), PrefixCache()
    if known:
        held = load_prompt_cache(path, model, quantized=kv_bits is not None)
        prefixes.store(held.ids, held.layers, kind)
    yield prefixes
    if not known and (newest := prefixes.newest(kind)) is not None:
        save_prompt_cache(path, newest, model)


def _checked_ids(ids: Any, model: Model, path: Path) -> list[int]:
    try:
        return require_token_ids(ids, model.args.vocab_size, where="ids")
    except ConfigError as error:
        raise FormatError(str(error), where=path) from error


def _held(path: Path, model: Model, tensors: Mapping[str, LazyTensor], name: str, length: int) -> mx.array:
    shape = (1, model.args.num_kv_heads, length, model.args.head_dim)
    if name not in tensors or tensors[name].shape != shape:
        found = tensors[name].shape if name in tensors else "nothing"
        raise FormatError(f"wrong {name} in a prompt cache", where=path, expected=shape, found=found)
    return to_mlx(tensors[name])


def _require_name(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise SettingError("the name of a prompt cache", where=path, expected=".safetensors at its end")
