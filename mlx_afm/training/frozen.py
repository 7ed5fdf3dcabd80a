"""Activations behind frozen layers, computed once for each example.

Layers below the first trained one give the same for an example in every epoch. `FrozenLayers` computes that once and
asks a store for it from then on. Every example is computed alone, in the same pieces, so that what the store holds
depends on nothing but the example and the layers: not on seed, order, packing or the other examples.

Of an example is kept, in the model's dtype,
    before the last ordinary layer     the residual stream at all tokens that are read
    behind it                          the residual stream at trained positions, and that layer's keys and values at all
                                       tokens, as the int8 numbers that the model rounds them to, with their steps

Shape suffixes: B rows, L tokens, N output positions, T tokens of an example, D width, K key heads, E head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_afm.data import Batch, Tokens, make_batch
from mlx_afm.model import Activations, AFMConfig, KVCache, Model
from mlx_afm.model.cache import from_int8, to_int8
from mlx_afm.training.state import random_state, set_random_state

Array = npt.NDArray[Any]
PREFIXES = 4  # whose keys and values are held in memory


class ActivationStore(Protocol):
    """Where the arrays of examples are kept, by a key of 32 bytes."""

    def get(self, key: bytes) -> list[Array] | None:
        """The arrays of an example, or None if they are not there."""

    def put(self, key: bytes, arrays: Sequence[Array]) -> None:
        """Keeps them; a store that is full drops them."""

    def __contains__(self, key: bytes) -> bool:
        """Whether they are there."""


@dataclass(frozen=True)
class _Prefix:
    """What a beginning that many examples share left in the layers."""

    caches: list[KVCache]
    x_TD: mx.array | None


def first_trained_layer(model: Model) -> int:
    """How many layers from the bottom have nothing to train; 0 also if the embedding is trained."""
    if model.head.trainable_parameters():
        return 0
    trained = (number for number, layer in enumerate(model.layers) if tree_flatten(layer.trainable_parameters()))
    return next(trained, model.args.num_layers)


def is_random(model: Model, layer: int) -> bool:
    """Whether a layer below `layer` has dropout, so that it gives something else each time."""
    modules = (module for part in model.layers[:layer] for module in part.modules())
    return any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in modules)


class FrozenLayers:
    """The activations of examples behind the first layers of a model.

    Args:
        config: of the model.
        layer: how many layers there are below the first trained one; all of them for a teacher.
        load: gives a model whose first `layer` layers may be run, in the mode (training or not) in which they should
            compute. It is called when an example is missing.
        store: keeps activations; None computes them every time.
        prefix_end_id: the token that ends the beginning which many examples share, the system turn; its keys and
            values are computed once for the examples that follow each other with the same.

    Attributes:
        computed, found: how many examples were computed, and how many the store had.
    """

    def __init__(
        self,
        config: AFMConfig,
        layer: int,
        load: Callable[[], Model],
        store: ActivationStore | None = None,
        *,
        prefix_end_id: int | None = None,
    ) -> None:
        self.config, self.layer, self.store = config, layer, store
        self._load, self._prefix_end_id = load, prefix_end_id
        self._model: Model | None = None
        self._prefixes: dict[bytes, _Prefix] = {}
        self._missing: set[bytes] = set()  # of those that `expect` was given
        self.computed = self.found = 0

    @property
    def keeps_keys(self) -> bool:
        """Whether layers above read the keys and values of the last ordinary layer."""
        return self.config.num_ordinary_layers <= self.layer < self.config.num_layers

    def make_batch(self, rows: Sequence[Tokens]) -> Batch:
        """The batch of some examples, with their activations; takes the place of `make_batch`."""
        batch = make_batch(rows)
        return replace(batch, activations=self.activations_of(batch))

    def activations_of(self, batch: Batch) -> Activations:
        """The activations of the examples of a batch, as `Model.hidden` takes them."""
        parts = [self._example(row) for row in batch.rows]
        rows, tokens = batch.inputs_BL.shape
        places = [self._stream_places(row, place) for row, place in zip(batch.rows, batch.places)]
        stream = _placed(places, [part[0] for part in parts], rows * tokens)
        x_BLD = _as_floats(stream).reshape(rows, tokens, -1)
        if self.layer < self.config.num_ordinary_layers:
            return Activations(self.layer, x_BLD)
        x_BND = mx.take_along_axis(x_BLD, batch.output_positions_BN[..., None], axis=1)
        if not self.keeps_keys:
            return Activations(self.layer, x_BND)
        held = []
        for number in (1, 2):
            flat = _placed(batch.places, [part[number] for part in parts], rows * tokens)
            values = mx.array(flat) if self.config.kv_quant else _as_floats(flat)
            held.append(values.reshape(rows, tokens, *flat.shape[1:]).transpose(0, 2, 1, 3))
        if self.config.kv_quant:
            steps = mx.array(parts[0][3])
            held = [from_int8(numbers, step, x_BND.dtype) for numbers, step in zip(held, steps)]
        return Activations(self.layer, x_BND, *held)

    def key(self, row: Tokens) -> bytes:
        """What names an example: its tokens, and which of them are trained where only those are kept."""
        digest = hashlib.sha256(np.ascontiguousarray(row.ids[:-1], np.int32).tobytes())
        if self.layer >= self.config.num_ordinary_layers:
            digest.update(np.flatnonzero(row.weights[1:]).astype(np.int32).tobytes())
        return digest.digest()

    @property
    def missing(self) -> int:
        """How many of the expected examples the store still lacks; 0 without a store."""
        return len(self._missing)

    def expect(self, *splits: Sequence[Tokens]) -> None:
        """Names the examples that will be asked for; when the store has them all, the model is let go."""
        if self.store is not None:
            keys = {self.key(row) for data in splits for row in data}
            self._missing = {key for key in keys if key not in self.store}

    def _note_seen(self, key: bytes) -> None:
        """Lets the model go when nothing is missing any more; it is loaded again if that was too early."""
        if key in self._missing:
            self._missing.discard(key)
            if not self._missing:
                self._model = None
                self._prefixes.clear()
                mx.clear_cache()

    def _example(self, row: Tokens) -> list[Array]:
        key = self.key(row)
        kept = None if self.store is None else self.store.get(key)
        if kept is not None:
            self.found += 1
        else:
            self.computed += 1
            kept = self._compute(row)
            if self.store is not None:
                self.store.put(key, kept)
        if self._missing:
            self._note_seen(key)
        return kept

    def _compute(self, row: Tokens) -> list[Array]:
        if self._model is None:
            random = random_state()  # making a model draws numbers, which dropout above must not miss
            self._model = self._load()
            self._model.freeze()
            set_random_state(random)
        model, ids = self._model, row.ids[:-1]
        behind = self.layer >= self.config.num_ordinary_layers
        outputs = self._outputs(row)
        start = self._shared(ids, outputs[0])
        prefix = self._prefix(model, ids[:start])
        caches = [cache.copy() for cache in prefix.caches]
        wanted = mx.array(outputs[None] - start) if behind else None
        passed = model.activations(mx.array(ids[None, start:]), self.layer, cache=caches, output_positions=wanted)
        x_TD = passed.x[0]
        if not behind and prefix.x_TD is not None:
            x_TD = mx.concatenate([prefix.x_TD, x_TD])
        if not self.keeps_keys:
            return [_to_numpy(x_TD)]
        k, v = (array[0].transpose(1, 0, 2) for array in (passed.keys, passed.values) if array is not None)
        if not self.config.kv_quant:
            return [_to_numpy(x_TD), _to_numpy(k), _to_numpy(v)]
        last = model.model.layers[-1].self_attn
        steps = mx.stack([last.quant_key_scale, last.quant_value_scale]).astype(mx.float32)
        numbers = [np.array(to_int8(array, step)) for array, step in zip((k, v), steps)]
        return [_to_numpy(x_TD), *numbers, np.array(steps)]

    def _outputs(self, row: Tokens) -> Array:
        """Indices of the tokens whose predictions are trained; the last one if none is."""
        outputs = np.flatnonzero(row.weights[1:])
        return outputs if len(outputs) else np.array([len(row) - 2])

    def _stream_places(self, row: Tokens, place: Array) -> Array:
        """Where the kept rows of the stream belong: all tokens of the example, or its trained positions."""
        return place if self.layer < self.config.num_ordinary_layers else place[self._outputs(row)]

    def _shared(self, ids: Array, first: int) -> int:
        """How many tokens are computed as a prefix: up to the end of the first turn, before anything trained."""
        if self._prefix_end_id is None:
            return 0
        ends = np.flatnonzero(ids[:first] == self._prefix_end_id)
        return int(ends[0]) + 1 if len(ends) else 0

    def _prefix(self, model: Model, ids: Array) -> _Prefix:
        key = ids.tobytes()
        if (found := self._prefixes.get(key)) is None:
            caches, x_TD = model.make_cache(), None
            if len(ids):
                stop = min(self.layer, self.config.num_ordinary_layers)
                last = mx.array([[len(ids) - 1]]) if self.layer >= stop == self.config.num_ordinary_layers else None
                x_TD = model.activations(mx.array(ids[None]), stop, cache=caches, output_positions=last).x[0]
                mx.eval(x_TD, [cache.state[:2] for cache in caches if not cache.empty()])
            found = self._prefixes[key] = _Prefix(caches, x_TD)
            for old in list(self._prefixes)[:-PREFIXES]:
                del self._prefixes[old]
        return found


def _placed(places: Sequence[Array], values: Sequence[Array], tokens: int) -> Array:
    """Rows of examples at their places; zeros where nobody is."""
    found = np.zeros((tokens, *values[0].shape[1:]), values[0].dtype)
    for place, rows in reversed(list(zip(places, values))):  # of tokens in common the first example's count
        found[place] = rows
    return found


def _to_numpy(x: mx.array) -> Array:
    """A float array; bfloat16 as its bit patterns."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _as_floats(values: Array) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if values.dtype == np.uint16 else array
