"""The one table of tensor names: the toolkit's state dict and ours, both directions.

The modules of a layer are listed once, in the order of the state dict. `plan_names` unrolls them
for a configuration into full names with shapes; reading, writing and checking all start from that
plan, so the inverse is derived and never written down. Ours are mlx-lm's `afm7` names; an adapter's
are those of `mlx_afm.model.lora`.

Weights are (out, in) on both sides, `lora_a` / `a_transpose` (in, R), `lora_b` / `b_transpose`
(R, out): nothing is ever transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from mlx_afm.model import AdapterSpec, AFMConfig, ToolkitConfig

DEFAULT_ADAPTER = "base_adapter"  # the id the toolkit's files use

_IN_LAYER = re.compile(r"model\.(?P<kind>layers|kv_reuse_layers)\.(?P<number>\d+)\.")


class Kind(Enum):
    """What a tensor of the state dict is to us."""

    WEIGHT = "weight"  # a weight of the MLX model
    RANGE = "range"  # an observer's (min, max); the model holds the scale it implies
    SAMPLES = "samples"  # an observer's counter; kept for the way back only
    ADAPTER = "adapter"  # one matrix of the adapter
    ALIAS = "alias"  # the head: the same storage as the embedding


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the toolkit's state dict.

    Attributes:
        toolkit: its full name there.
        ours: its full name here; for RANGE the scale derived from it, for SAMPLES "".
        shape: its shape, the same on both sides but for RANGE.
        kind: what it is.
    """

    toolkit: str
    ours: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Projection:
    """A projection that can carry an adapter.

    Attributes:
        toolkit, ours: module names within a layer.
        target: the short names of its parts: one, or three for the fused projection.
    """

    toolkit: str
    ours: str
    target: tuple[str, ...]


QKV = Projection("attention.qkv_transform", "self_attn.qkv_proj", ("q", "k", "v"))
Q = Projection("attention.q_transform", "self_attn.q_proj", ("q",))
OUT = Projection("attention.output_transform", "self_attn.out_proj", ("o",))
GATE = Projection("feed_forward.hidden_transform.linear_0", "mlp.gate_proj", ("gate",))
UP = Projection("feed_forward.hidden_transform.linear_1", "mlp.up_proj", ("up",))
DOWN = Projection("feed_forward.output_transform", "mlp.down_proj", ("down",))
PROJECTIONS = (QKV, Q, OUT, GATE, UP, DOWN)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_TARGET_OF_MODULE = {item.ours.rsplit(".", 1)[-1]: item.target[0] for item in PROJECTIONS if item is not QKV}

QUERY_NORM = "attention.qk_norm.query_norm.weight"
REUSE_QUERY_NORM = "attention.q_norm.query_norm.weight"
KEY_NORM = "attention.qk_norm.key_norm.weight"
OBSERVER = "attention.kv_quantizer.{}_quantizer.activation_post_process."


def plan_names(config: ToolkitConfig) -> list[TensorEntry]:
    """Every tensor of the toolkit's state dict for a configuration, in its order."""
    model, adapter = config.model, config.adapter
    table = (model.vocab_size, model.hidden_dim)
    entries = [TensorEntry("embedding.weight", "model.embedding.weight", table, Kind.WEIGHT)]
    for index in range(model.num_ordinary_layers):
        entries += _layer(model, adapter, index, reuse=False)
    for index in range(model.num_kv_reuse_layers):
        entries += _layer(model, adapter, index, reuse=True)
    entries.append(TensorEntry("output_norm.weight", "model.output_norm.weight", (model.hidden_dim,), Kind.WEIGHT))
    entries.append(TensorEntry("output_transform.weight", "model.embedding.weight", table, Kind.ALIAS))
    return entries


def plan_adapter(model: AFMConfig, adapter: AdapterSpec) -> list[TensorEntry]:
    """The adapter's tensors alone, in the order of the state dict."""
    entries = plan_names(ToolkitConfig(model=model, adapter=adapter))
    return [entry for entry in entries if entry.kind is Kind.ADAPTER]


def target_of(name: str) -> str:
    """The short name of the projection that one of our adapter tensors belongs to."""
    module = name.split(".")[-2]
    return _TARGET_OF_MODULE.get(module, module)


def _prefixes(model: AFMConfig, index: int, reuse: bool) -> tuple[str, str]:
    if reuse:
        return f"layers.segment_1.layer_{index}.", f"model.kv_reuse_layers.{index}."
    segment = "segment_0." if model.num_kv_reuse_layers else ""
    return f"layers.{segment}layer_{index}.", f"model.layers.{index}."


def _layer(model: AFMConfig, adapter: AdapterSpec | None, index: int, *, reuse: bool) -> Iterator[TensorEntry]:
    theirs, ours = _prefixes(model, index, reuse)
    width = model.hidden_dim

    def norm(toolkit: str, mine: str, size: int) -> TensorEntry:
        return TensorEntry(theirs + toolkit, ours + mine + ".weight", (size,), Kind.WEIGHT)

    def projection(item: Projection) -> Iterator[TensorEntry]:
        yield from _projection(model, adapter, item, theirs, ours)

    yield norm("attention.norm.weight", "input_layernorm", width)
    yield from projection(Q if reuse else QKV)
    yield norm(REUSE_QUERY_NORM if reuse else QUERY_NORM, "self_attn.q_norm", model.head_dim)
    if not reuse:
        yield norm(KEY_NORM, "self_attn.k_norm", model.head_dim)
        if model.kv_quant:
            for side in ("key", "value"):
                observer, scale = theirs + OBSERVER.format(side), f"{ours}self_attn.quant_{side}_scale"
                yield TensorEntry(observer + "range", scale, (2,), Kind.RANGE)
                yield TensorEntry(observer + "num_samples", "", (), Kind.SAMPLES)
    yield from projection(OUT)
    yield norm("feed_forward.norm.weight", "post_attention_layernorm", width)
    for item in (GATE, UP, DOWN):
        yield from projection(item)


def _sizes(model: AFMConfig, target: str) -> tuple[int, int]:
    """Input and output width of one part of a projection."""
    width, inner = model.hidden_dim, model.feed_forward_dim
    outputs = {"k": model.kv_dim, "v": model.kv_dim, "gate": inner, "up": inner}
    return (inner if target == "down" else width), outputs.get(target, width)


def _projection(
    model: AFMConfig, adapter: AdapterSpec | None, item: Projection, theirs: str, ours: str
) -> Iterator[TensorEntry]:
    fused = len(item.target) > 1
    sizes = [_sizes(model, target) for target in item.target]
    wrapped = ".wrapped" if adapter else ""
    matrix = ".fused_linear.weight" if fused else ".weight"
    shape = (sum(output for _, output in sizes), sizes[0][0])
    yield TensorEntry(theirs + item.toolkit + wrapped + matrix, f"{ours}{item.ours}.weight", shape, Kind.WEIGHT)
    if adapter is None:
        return
    for number, (target, (inputs, outputs)) in enumerate(zip(item.target, sizes)):
        their_pair = f"{theirs}{item.toolkit}.adapters.{adapter.name}." + (f"lora_{number}." if fused else "")
        our_pair = f"{ours}{item.ours}." + (f"{target}." if fused else "")
        yield TensorEntry(their_pair + "a_transpose", our_pair + "lora_a", (inputs, adapter.rank), Kind.ADAPTER)
        yield TensorEntry(their_pair + "b_transpose", our_pair + "lora_b", (adapter.rank, outputs), Kind.ADAPTER)


_ADAPTER_ID = re.compile(r"\.adapters\.(?P<id>[^.]+)\.")
_LAYER = re.compile(
    r"(?:layers\.(?P<segment>segment_[01]\.)?layer_|model\.(?P<kind>layers|kv_reuse_layers)\.)(?P<n>\d+)\."
)


def adapter_ids(names: Iterator[str] | list[str]) -> list[str]:
    """The adapter ids that occur in toolkit names, sorted."""
    return sorted({match["id"] for name in names if (match := _ADAPTER_ID.search(name))})


def count_layers(names: Iterator[str] | list[str]) -> tuple[int, int]:
    """Ordinary and KV-reuse layers that occur in names of either side."""
    highest = [-1, -1]
    for name in names:
        if match := _LAYER.match(name):
            reuse = match["segment"] == "segment_1." or match["kind"] == "kv_reuse_layers"
            highest[reuse] = max(highest[reuse], int(match["n"]))
    return highest[0] + 1, highest[1] + 1


def layer_of(name: str, base: AFMConfig) -> int | None:
    """The number of the layer that a tensor belongs to; None for the embedding and the last norm."""
    match = _IN_LAYER.match(name)
    if match is None:
        return None
    return int(match["number"]) + (base.num_ordinary_layers if match["kind"] == "kv_reuse_layers" else 0)
