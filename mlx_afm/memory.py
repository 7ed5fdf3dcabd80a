"""Peak memory of a training step, before anything is loaded: what the model's code keeps, counted.

    held all along      base weights, adapter, optimizer state
    at the loss         + what every layer keeps for the backward pass, + chunks of logits
    in the backward     + the same, + working space of the block that is gone through
    at the update       + gradients twice (as summed, and as divided and clipped), + the update's own

The peak is the first and the largest of the others. Everything is counted from shapes but the working spaces,
which depend on how far MLX runs ahead; their constants are measured by bench_memory.py on the CPU backend.
A GPU's are taken to be the same, since MLX holds both back by the same count of tasks; nobody has measured that.

Shape letters: D width, F feed-forward, K all key heads together, H heads, R rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_afm.adapters import LoRAConfig, adapter_shapes
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.adapters.layers import ALL, chosen_layers
from mlx_afm.checkpoints.names import Kind, layer_of, plan_names
from mlx_afm.data import Batch
from mlx_afm.model import AFMConfig, ToolkitConfig
from mlx_afm.quant import Scheme
from mlx_afm.training.loss import CHUNK_TOKENS

WIDE = 4  # bytes of a float32
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# MLX starts new operations until ten are unfinished, and what they read and write stays until they are done: the limit
# of its scheduler, seen in docs/decisions/0004 as ten chunks of logits where three would do.
OPERATIONS_IN_FLIGHT = 10
LOSS_COPIES = 4  # of float32 logits of the tokens that are read,
LOSS_LIMIT = OPERATIONS_IN_FLIGHT + 1  # and of a chunk of logits, however many chunks there are
NARROW_LOSS_COPIES = 2.4  # of 16-bit logits besides, where the model is narrow,
NARROW_LOSS_LIMIT = 3  # and of a chunk
# Working space of a block: of its feed-forward or of its attention, whichever is larger. So many arrays of these
# widths a token; with checkpointing beside what the block then keeps.
FEED_FORWARD = {"F": 11.2, "D": 6.0, "R": 20.0}
ATTENTION = {"scores": 3.4, "D": 9.0, "K": 8.0, "R": 20.0}
FEED_FORWARD_AGAIN = {"F": 12.0, "D": 2.0, "R": 20.0}
MASKED = 1.3  # scores of tokens that are read, whose mask is an array
ATTENTION_AGAIN = {"scores": 4.2, "D": 16.0, "K": 8.0, "R": 20.0}
NARROW_FACTOR = 1.4  # of that space in 16 bits, where norms and the like are float32 in between
UPDATE_COPIES = {"adamw": 2, "adam": 2}  # arrays that the update of one tensor makes; 1 for the others
DENSE_COPIES = 3  # of a matrix in float32 that is made dense (codes on the CPU, 16 bits under DoRA) or rounded (qat)
HEAD_COPIES = 2.15  # of the head that is made dense in pieces, forward and backward, if it is small;
HEAD_PIECES = 5  # else so many beyond one whole head
DENSE_VALUES = 1 << 24  # of a piece, see model/packed.py


@dataclass(frozen=True, kw_only=True)
class Base:
    """How the base model's weights are held: the quantized matrices by module path, all else in `dtype`."""

    dtype: str = "bfloat16"
    schemes: Mapping[str, Scheme] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape of one micro-batch.

    Attributes:
        rows, tokens: of the inputs, padding included.
        output_positions: indices a row whose outputs are read.
        reach: (groups, queries, keys) of a packed row, see `mlx_afm.model.KeyIndices`; None for whole rows.
        output_reach: the same of the tokens that are read.
    """

    rows: int
    tokens: int
    output_positions: int
    reach: tuple[int, int, int] | None = None
    output_reach: tuple[int, int, int] | None = None

    @property
    def scores(self) -> tuple[int, int]:
        """Scores of one head, of all queries and of those that are read."""
        plain = self.rows * self.tokens * self.tokens, self.rows * self.output_positions * self.tokens
        reaches = self.reach, self.output_reach
        return tuple(math.prod(reach) if reach else count for reach, count in zip(reaches, plain))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a training step.

    Attributes:
        weights_bytes: of the base, in its dtype or quantized; of full fine-tuning all weights, in float32.
        adapter_bytes, gradients_bytes, optimizer_bytes: float32.
        activations_bytes: kept for the backward pass.
        working_bytes: of the largest block in its backward pass, beyond those.
        loss_bytes: of the chunks of logits.
        update_bytes: gradients and what the optimizer makes besides.
        peak_bytes: the most at a time.
    """

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    working_bytes: int
    loss_bytes: int
    update_bytes: int
    peak_bytes: int


def layout_of(batch: Batch) -> Layout:
    """The shape of a micro-batch."""
    (rows, tokens), outputs = batch.inputs_BL.shape, batch.output_positions_BN.shape[1]
    if batch.packing is None:
        return Layout(rows=rows, tokens=tokens, output_positions=outputs)
    reaches: Any = [reach.mask_GQS.shape for reach in (batch.packing.everyone, batch.packing.output_positions)]
    return Layout(rows=rows, tokens=tokens, output_positions=outputs, reach=reaches[0], output_reach=reaches[1])


def estimate_training(
    model: AFMConfig,
    base: Base,
    adapter: LoRAConfig,
    layout: Layout,
    *,
    optimizer: str = "adamw",
    grad_checkpoint: bool = False,
    accumulated: bool = False,
    backend: str = "cpu",
    unloaded_layers: int = 0,
) -> MemoryEstimate:
    """Peak memory of a step as `mx.get_peak_memory` counts it; buffers that MLX keeps for reuse are not in it.

    Args:
        model: sizes.
        base: dtype and codes.
        adapter: what is trained.
        layout: shape of the largest micro-batch.
        optimizer: its name, see `TrainConfig`.
        grad_checkpoint: whether each layer is computed again.
        accumulated: whether a step has several micro-batches: their summed gradients are held as well.
        backend: "cpu" or "gpu"; the CPU multiplies codes by making them dense.
        unloaded_layers: lower layers whose weights are not in memory, since their activations are kept on disk.

    Source: within 15 % of the measured peak, `docs/memory.md` has the figures.
    """
    full = adapter.fine_tune_type in WHOLE_WEIGHTS
    trained = adapter_shapes(model, adapter)
    trained_bytes = WIDE * sum(map(math.prod, trained.values()))
    weights = weight_bytes(model, Base(dtype="float32") if full else base, unloaded_layers)
    steps = _Step(model, base, adapter, layout, grad_checkpoint, backend)
    optimizer_bytes = WIDE * sum(_state_size(optimizer, name, shape) for name, shape in trained.items())
    in_flight = sorted((WIDE * math.prod(shape) for shape in trained.values()), reverse=True)[:OPERATIONS_IN_FLIGHT]
    update = (3 if optimizer == "muon" else 2) * trained_bytes + UPDATE_COPIES.get(optimizer, 1) * sum(in_flight)
    activations, (working, place), loss = steps.kept(), steps.working(), steps.loss()
    layer_gradients = trained_bytes // len(chosen_layers(adapter.layers, model))
    backward = max(activations + loss, place + layer_gradients) + (trained_bytes if accumulated else 0)
    adapter_bytes = 0 if full else trained_bytes
    return MemoryEstimate(
        weights_bytes=weights,
        adapter_bytes=adapter_bytes,
        gradients_bytes=trained_bytes,
        optimizer_bytes=optimizer_bytes,
        activations_bytes=activations,
        working_bytes=working,
        loss_bytes=loss,
        update_bytes=update,
        peak_bytes=weights + adapter_bytes + optimizer_bytes + max(backward, update),
    )


def weight_bytes(model: AFMConfig, base: Base, unloaded_layers: int = 0) -> int:
    """Bytes of the base model's tensors, exactly, without the lowest layers if they are not loaded."""
    size = 0
    for entry in plan_names(ToolkitConfig(model=model, adapter=None)):
        layer = layer_of(entry.ours, model)
        if layer is not None and layer < unloaded_layers:
            continue
        scheme = base.schemes.get(entry.ours.removesuffix(".weight"))
        if entry.kind is Kind.RANGE:
            size += WIDE
        elif entry.kind is Kind.WEIGHT and scheme is not None:
            size += scheme.nbytes(entry.shape[0], entry.shape[1], base.dtype)
        elif entry.kind is Kind.WEIGHT:
            size += math.prod(entry.shape) * DTYPE_BYTES[base.dtype]
    return size


def _state_size(optimizer: str, name: str, shape: tuple[int, ...]) -> int:
    """Numbers that an optimizer holds for a tensor."""
    matrix = len(shape) == 2
    if optimizer == "adafactor" and matrix:
        return sum(shape)
    double = optimizer in ("adam", "adamw") or (optimizer == "muon" and (not matrix or "embedding" in name))
    return (2 if double else 1) * math.prod(shape)


@dataclass(frozen=True)
class _Step:
    """What a forward and a backward pass take."""

    model: AFMConfig
    base: Base
    adapter: LoRAConfig
    layout: Layout
    checkpointed: bool
    backend: str

    @property
    def number(self) -> int:
        """Bytes of an activation."""
        return WIDE if self.adapter.fine_tune_type in WHOLE_WEIGHTS else DTYPE_BYTES[self.base.dtype]

    @property
    def all_tokens(self) -> int:
        return self.layout.rows * self.layout.tokens

    @property
    def read_tokens(self) -> int:
        return self.layout.rows * self.layout.output_positions

    def layers(self) -> tuple[int, bool, int]:
        """How many layers, from the first trained one on: ordinary ones without the last, the last, reusing ones."""
        ordinary, chosen = self.model.num_ordinary_layers, chosen_layers(self.adapter.layers, self.model)
        first = min(chosen)
        return max(0, ordinary - 1 - first), first < ordinary, self.model.num_layers - max(first, ordinary)

    def _queries(self) -> int:
        """Numbers a token in any layer: its input, queries, attention, residual; gate and up, on the CPU the activated
        gate, its slopes and up; the adapter's inner product behind attention, and with dropout what goes into it."""
        inner = self.adapter.rank if "o" in self.adapter.targets else 0
        wide = (3 if self.backend == "cpu" else 2) * self.model.feed_forward_dim
        return (5 if self.adapter.dropout else 4) * self.model.hidden_dim + wide + inner

    def _keys(self) -> int:
        """Bytes of keys and values: keys rotated (float32, for their norm), both as they are attended to."""
        return self.model.kv_dim * self.all_tokens * (2 * self.number + WIDE)

    def _block(self) -> tuple[int, int, int]:
        """Bytes that a layer keeps: an ordinary one, the last ordinary one, one that reuses keys."""
        wide = self.number * self.model.hidden_dim * self.all_tokens
        narrow = self.number * self._queries() * self.read_tokens
        ordinary = self.number * self._queries() * self.all_tokens + self._keys()
        return ordinary, wide + narrow + self._keys(), narrow

    def kept(self) -> int:
        """Bytes kept for the backward pass: by checkpointed layers their inputs, and the keys and values shared."""
        ordinary, last, reusing = self.layers()
        if not self.checkpointed:
            blocks = self._block()
            return ordinary * blocks[0] + last * blocks[1] + reusing * blocks[2]
        shared = 2 * self.model.kv_dim * self.all_tokens
        inputs = (ordinary + last) * self.all_tokens + (reusing + 1) * self.read_tokens
        return self.number * (inputs * self.model.hidden_dim + shared)

    def working(self) -> tuple[int, int]:
        """Bytes of the largest block; and the most that is kept and worked with at a time."""
        ordinary, last, reusing = self.layers()
        kept, blocks, dense = self.kept(), self._block(), self._dense()
        narrow = self._space(self.read_tokens, MASKED * self.layout.scores[1], blocks[1] if last else blocks[2]) + dense
        if not ordinary:
            return narrow, kept + narrow
        wide = self._space(self.all_tokens, self.layout.scores[0], blocks[0]) + dense
        gone = 0 if self.checkpointed else last * blocks[1] + reusing * blocks[2]
        return max(narrow, wide), max(kept + narrow, kept - gone + wide)

    def _space(self, tokens: int, scores: float, block: int) -> int:
        model, rank = self.model, 0 if self.adapter.fine_tune_type in WHOLE_WEIGHTS else self.adapter.rank
        widths = {"F": model.feed_forward_dim, "D": model.hidden_dim, "K": model.kv_dim, "R": rank}
        sizes = {name: tokens * width for name, width in widths.items()} | {"scores": scores * model.num_heads}
        parts = (FEED_FORWARD_AGAIN, ATTENTION_AGAIN) if self.checkpointed else (FEED_FORWARD, ATTENTION)
        numbers = max(sum(copies * sizes[name] for name, copies in part.items()) for part in parts)
        space = numbers * self.number * (1 if self.number == WIDE else NARROW_FACTOR)
        return round(space) + (block if self.checkpointed else 0)

    def _dense(self) -> int:
        """Bytes of a layer's largest matrix where it is made dense."""
        codes = bool(self.base.schemes) and self.backend == "cpu"
        lengths = self.adapter.fine_tune_type == "dora" and self.base.dtype != "float32"
        rounded = self.adapter.fine_tune_type == "qat"
        values = self.model.hidden_dim * self.model.feed_forward_dim
        return DENSE_COPIES * WIDE * min(values, DENSE_VALUES) if codes or lengths or rounded else 0

    def loss(self) -> int:
        """Bytes of logits; all of them if the head is trained."""
        rows, most = self.read_tokens, CHUNK_TOKENS
        if self.adapter.fine_tune_type == "full" and self.adapter.layers == ALL:
            most = rows
        copies = min(LOSS_COPIES * rows, LOSS_LIMIT * most) * WIDE
        if self.number < WIDE:
            copies += round(min(NARROW_LOSS_COPIES * rows, NARROW_LOSS_LIMIT * most) * self.number)
        space = copies * self.model.vocab_size
        if self.base.schemes and self.backend == "cpu":
            values = self.model.hidden_dim * self.model.vocab_size
            space += round(WIDE * min(HEAD_COPIES * values, values + HEAD_PIECES * DENSE_VALUES))
        return space
