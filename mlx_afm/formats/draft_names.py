"""Draft tensors by the names of a checkpoint spec, from those of the toolkit's draft checkpoint.

    embedding.weight                             decoder.emb.token_emb._embedding
    output_norm.weight                           decoder.output_norm.scale
    layers.layer_N.                              decoder.transformer.layerN.
      attention.norm.weight                        self_attention.norm.scale
      attention.qkv_transform.fused_linear.weight  self_attention.attention.i_proj.qkv_proj.{q,k,v}_proj.kernel
      attention.qk_norm.query_norm.weight          self_attention.attention.scale_query.scale
      attention.qk_norm.key_norm.weight            self_attention.attention.scale_key.scale
      attention.output_transform.weight            self_attention.attention.o_proj.conv.kernel
      feed_forward.norm.weight                     feed_forward.norm.scale
      feed_forward.hidden_transform.linear_0/1     feed_forward.linear1_0/1.kernel
      feed_forward.output_transform.weight         feed_forward.linear2.kernel

A leading `model.` is dropped. The head (`output_transform.weight`) must be the embedding and has no place of its
own. Rows of Q and K, and the values of their norms, are reordered within each head from pairs (2i, 2i+1) to
halves (i, i + width/2), as in `fmadapter_plan`. What the table does not know keeps its name.

Source: public descriptions of the toolkit's exporter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.formats.tensors import LazyTensor

Array = npt.NDArray[Any]

_LAYER = re.compile(r"layers\.layer_(\d+)\.(.+)", re.ASCII)
_FUSED = "attention.qkv_transform.fused_linear.weight"
_ATTENTION = "self_attention.attention."
_TOP = {"embedding.weight": "decoder.emb.token_emb._embedding", "output_norm.weight": "decoder.output_norm.scale"}
_PLAIN = {
    "attention.norm.weight": "self_attention.norm.scale",
    "attention.output_transform.weight": _ATTENTION + "o_proj.conv.kernel",
    "feed_forward.norm.weight": "feed_forward.norm.scale",
    "feed_forward.hidden_transform.linear_0.weight": "feed_forward.linear1_0.kernel",
    "feed_forward.hidden_transform.linear_1.weight": "feed_forward.linear1_1.kernel",
    "feed_forward.output_transform.weight": "feed_forward.linear2.kernel",
}
_NORMS = {
    "attention.qk_norm.query_norm.weight": _ATTENTION + "scale_query.scale",
    "attention.qk_norm.key_norm.weight": _ATTENTION + "scale_key.scale",
}


def spec_tensors(
    tensors: Mapping[str, LazyTensor], *, heads: int, kv_heads: int, where: object
) -> dict[str, LazyTensor]:
    """The tensors under the spec's names, as the device wants their rows; values still come on demand.

    Args:
        tensors: the state dict of a draft model.
        heads, kv_heads: its query heads, and its key and value heads.
        where: for errors.

    Raises:
        FormatError: a head that is not the embedding; a fused projection or a norm that such heads cannot have.
    """
    known = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    head, embedding = known.pop("output_transform.weight", None), known.get("embedding.weight")
    if head is not None and embedding is not None and not _equal(embedding, head):
        advice = "The package's draft program has one table for both"
        raise FormatError("the output head is not the embedding", where=where, advice=advice)
    named: dict[str, LazyTensor] = {}
    for name, tensor in known.items():
        layer = _LAYER.fullmatch(name)
        if layer is None:
            named[_TOP.get(name, name)] = tensor
            continue
        prefix = f"decoder.transformer.layer{layer[1]}."
        if layer[2] == _FUSED:
            for part, piece in _split(tensor, heads, kv_heads, f"{where}, {name}"):
                named[f"{prefix}{_ATTENTION}i_proj.qkv_proj.{part}_proj.kernel"] = piece
        elif layer[2] in _NORMS:
            _require_even(tensor.shape[:1], f"{where}, {name}")
            named[prefix + _NORMS[layer[2]]] = _changed(tensor, tensor.shape, partial(halves_of_pairs, heads=1))
        else:
            named[prefix + _PLAIN[layer[2]] if layer[2] in _PLAIN else name] = tensor
    return named


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    return first.same_stored(second)


def _split(tensor: LazyTensor, heads: int, kv_heads: int, where: str) -> Iterator[tuple[str, LazyTensor]]:
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 0
    width, rest = divmod(rows, heads + 2 * kv_heads)
    if rest or not rows or width % 2:
        expected = f"a matrix of {heads} + 2 x {kv_heads} heads of even width"
        raise FormatError("not a fused projection of these heads", where=where, expected=expected, found=tensor.shape)
    start = 0
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        stop = start + count * width
        change = partial(_rows, start=start, stop=stop, heads=0 if part == "v" else count)
        yield part, _changed(tensor, (stop - start, tensor.shape[1]), change)
        start = stop


def _rows(values: Array, *, start: int, stop: int, heads: int) -> Array:
    part = values[start:stop]
    return halves_of_pairs(part, heads=heads) if heads else part


def _require_even(sizes: tuple[int, ...], where: str) -> None:
    if not sizes or sizes[0] % 2:
        raise FormatError("not the norm of a head of even width", where=where, found=sizes)


def halves_of_pairs(values: Array, *, heads: int) -> Array:
    """First axis, head by head: 0 1 2 3 4 5 -> 0 2 4 1 3 5."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _changed(tensor: LazyTensor, shape: tuple[int, ...], change: Callable[[Array], Array]) -> LazyTensor:
    return LazyTensor(tensor.dtype, shape, lambda: change(tensor.read_stored()))
