"""The draft pair of a package: `draft.mil` as the toolkit has it, and its weights template with other values.

`draft_weights.bin` is `weights_template.bin`, a blob file (`blob`), in which the payloads that the spec names
(`draft_spec`) were overwritten. Header, metadata blocks, padding, file size, and records that the spec does not name
stay byte for byte. The template must keep every rule of the container.

Source: public descriptions of the toolkit's exporter. None of its three assets is known to us.

Draft tensors by the names of a checkpoint spec, from those of the toolkit's draft checkpoint.

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
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import FormatError
from mlx_afm.files import atomic_file
from mlx_afm.formats.blob import map_bytes, read_blobs
from mlx_afm.formats.draft_spec import DraftTensor, encode, payload, require_places, without_units
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


PROGRAM_FILE, WEIGHTS_FILE = "draft.mil", "draft_weights.bin"
_SHOWN = 20


@dataclass(frozen=True)
class DraftPair:
    """Everything the two files are made of.

    Attributes:
        program: the toolkit's `draft.mil`.
        template: the toolkit's `weights_template.bin`.
        spec: what goes where.
        tensors: draft tensors by the spec's names, float32 (or float16).
        surplus: tensors that the spec has no place for; not stored.
    """

    program: Path
    template: Path
    spec: Sequence[DraftTensor]
    tensors: Mapping[str, LazyTensor]
    surplus: tuple[str, ...] = ()

    def checked(self, *, ignore_surplus: bool = False) -> DraftPair:
        """The same pair, once all of it was found to fit together; values are not looked at.

        Args:
            ignore_surplus: leave tensors without a place out, as the toolkit does.

        Raises:
            FormatError: an empty or missing program; a template that breaks a rule; a spec that does not fit it;
                tensors missing, surplus or of another shape, all listed.
        """
        if not len(map_bytes(self.program)):
            raise FormatError("empty", where=self.program, expected="the draft model's program")
        require_places(self.spec, read_blobs(self.template), where=self.template)
        places = {tensor.name for tensor in self.spec}
        surplus = tuple(sorted(set(self.tensors) - places))
        faults = [fault for item in self.spec if (fault := self._tensor_fault(item))]
        faults += [] if ignore_surplus else [f"{name}: the spec has no place for it" for name in surplus]
        if faults:
            raise FormatError(
                "not the tensors of the toolkit's draft model",
                expected=f"{len(places)} tensors",
                found=len(self.tensors),
                advice="Give a whole draft checkpoint of the model that draft-model-config.json describes",
                details=faults[:_SHOWN] + [f"... {len(faults)} faults in all"] * (len(faults) > _SHOWN),
            )
        return replace(self, surplus=surplus)

    def _tensor_fault(self, item: DraftTensor) -> str | None:
        tensor = self.tensors.get(item.name)
        if tensor is None:
            return f"{item.name}: missing"
        if without_units(tensor.shape) != item.shape:
            return f"{item.name}: expected shape {item.shape}, found {tensor.shape}"
        return None if tensor.dtype in ("float32", "float16") else f"{item.name}: dtype {tensor.dtype}"

    def write(self, folder: Path) -> None:
        """Writes both files into a package folder that is being made.

        Raises:
            FormatError: values that a form cannot hold, naming every tensor that has some; see also `checked`.

        Cost: the template and one tensor in memory; time see `kmeans_1d`.
        """
        records = require_places(self.spec, read_blobs(self.template), where=self.template)
        content = np.array(map_bytes(self.template))
        faults = []
        for item in self.spec:
            values = self.tensors[item.name].read_values().astype(np.float32, copy=False).reshape(item.shape)
            try:
                blobs = encode(values, item.format, item.name)
            except FormatError as error:
                faults.append(error)
                continue
            for role, offset in item.offsets.items():
                blob = records[offset]
                content[blob.offset : blob.offset + blob.nbytes] = payload(blobs[role], blob)
        if len(faults) > 1:
            details = [f"{fault.where}: {fault.what}" for fault in faults[:_SHOWN]]
            raise FormatError(f"{len(faults)} draft tensors cannot be stored", details=details)
        if faults:
            raise faults[0]
        with atomic_file(folder / WEIGHTS_FILE) as partial:
            content.tofile(partial)
        shutil.copyfile(self.program, folder / PROGRAM_FILE)
