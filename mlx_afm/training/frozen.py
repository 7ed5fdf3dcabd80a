"""Activations behind frozen layers, computed once for each example.

Layers below the first trained one give the same for an example in every epoch. `FrozenLayers` computes that once and
asks a store for it from then on. Examples are computed in groups of a few, which follow from the data alone: not from
seed, epoch or packing. So a run over a store and one that keeps nothing have the same bits.

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
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_afm.data import Batch, Tokens, make_batch, padded_batch
from mlx_afm.model import Activations, AFMConfig, KVCache, Model
from mlx_afm.model.cache import from_int8, to_int8
from mlx_afm.training.state import random_state, set_random_state

Array = npt.NDArray[Any]
PREFIXES = 4  # whose keys and values are held in memory
GROUP, GROUP_TOKENS = 4, 2048  # most examples of a group, and most tokens with their padding


class ActivationStore(Protocol):
    """Where the arrays of examples are kept, by a key of 32 bytes."""

    def get(self, key: bytes) -> list[Array] | None:
        """The arrays of an example, or None if they are not there."""

    def put(self, key: bytes, arrays: Sequence[Array]) -> None:
        """Keeps them; a store that is full drops them."""

    def __contains__(self, key: bytes) -> bool:
        """Whether they are there."""


@dataclass(frozen=True)
class _Group:
    """Examples of a split that are computed together, and a digest of what names them."""

    data: Sequence[Tokens]
    indices: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class _Prefix:
    """What a beginning that many examples share left in the layers."""

    caches: list[KVCache]
    x_TD: mx.array | None
    length: int


def first_trained_layer(model: Model) -> int:
    """How many layers from the bottom have nothing to train; 0 also if the embedding is trained."""
    if model.head.trainable_parameters():
        return 0
    trained = (number for number, layer in enumerate(model.layers) if tree_flatten(layer.trainable_parameters()))
    return next(trained, model.args.num_layers)


class FrozenLayers:
    """The activations of examples behind the first layers of a model.

    Args:
        config: of the model.
        layer: how many layers there are below the first trained one; all of them for a teacher.
        load: gives a model whose first `layer` layers may be run, in the mode (training or not) in which they should
            compute. It is called when an example is missing.
        store: keeps activations; None computes them every time.
        prefix_end_id: the token that ends the beginning which many examples share, the system turn; its keys and
            values are computed once for the groups that follow each other with the same.

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
        self._groups: dict[bytes, _Group] = {}  # by what names an example
        self.computed = self.found = 0

    @property
    def keeps_keys(self) -> bool:
        """Whether layers above read the keys and values of the last ordinary layer."""
        return self.config.num_ordinary_layers <= self.layer < self.config.num_layers

    def make_batch(self, rows: Sequence[Tokens]) -> Batch:
        """The batch of some examples, with their activations; takes the place of `make_batch`."""
        batch = make_batch(rows, by_outputs=self.keeps_keys)
        return replace(batch, activations=self.activations_of(batch))

    def activations_of(self, batch: Batch) -> Activations:
        """The activations of the examples of a batch, as `Model.hidden` takes them."""
        parts = [self._example(row) for row in batch.rows]
        rows, tokens = batch.inputs_BL.shape
        places = [self._stream_places(row, place) for row, place in zip(batch.rows, batch.places)]
        stream = _placed(places, [part[0] for part in parts], rows * tokens)
        if self.layer < self.config.num_ordinary_layers:
            return Activations(self.layer, _as_floats(stream).reshape(rows, tokens, -1))
        outputs_BN = np.array(batch.output_positions_BN) + tokens * np.arange(rows)[:, None]
        x_BND = _as_floats(stream[outputs_BN])
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
        """What an example is kept by: what names it, and the group that it is computed in."""
        name = self._name(row)
        group = self._groups.get(name)
        return hashlib.sha256(name + (name if group is None else group.digest)).digest()

    def _name(self, row: Tokens) -> bytes:
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
        """Names the examples that will be asked for, and groups those of a split by their lengths.

        When the store has them all, the model is let go.
        """
        for data in splits:
            self._groups = _grouped(data, [self._name(row) for row in data]) | self._groups
        if self.store is not None:
            keys = {self.key(row) for data in splits for row in data}
            self._missing = {key for key in keys if key not in self.store}

    def _group(self, name: bytes, row: Tokens) -> list[Tokens]:
        """The examples that are computed with one; itself alone if nobody expected it."""
        group = self._groups.get(name)
        return [row] if group is None else [group.data[index] for index in group.indices]

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
            kept = self._computed(row, key)
        if self._missing:
            self._note_seen(key)
        return kept

    def _computed(self, row: Tokens, key: bytes) -> list[Array]:
        """The arrays of an example; those of its group are kept as well."""
        name = self._name(row)
        group = self._group(name, row)
        names = [self._name(member) for member in group]
        arrays = self._compute(group)
        self.computed += 1
        if self.store is not None:
            for member, found in zip(group, arrays):
                other = self.key(member)
                if other not in self.store:
                    self.store.put(other, found)
        return arrays[names.index(name)]

    def _compute(self, group: Sequence[Tokens]) -> list[list[Array]]:
        if self._model is None:
            random = random_state()  # making a model draws numbers, which dropout above must not miss
            self._model = self._load()
            self._model.freeze()
            set_random_state(random)
        model, behind = self._model, self.layer >= self.config.num_ordinary_layers
        outputs = [self._outputs(row) for row in group]
        start = self._shared([row.ids[:-1] for row in group], min(int(output[0]) for output in outputs))
        prefix = self._prefix(model, group[0].ids[:start])
        batch = padded_batch(group)
        caches = [type(cache).merge([cache] * len(group)) for cache in prefix.caches]
        width = max(map(len, outputs))
        wanted = np.stack([np.pad(output, (0, width - len(output)), mode="edge") for output in outputs]) - start
        passed = model.activations(
            batch.inputs_BL[:, start:],
            self.layer,
            cache=caches,
            output_positions=mx.array(wanted) if behind else None,
        )
        mx.eval(passed.x, *(array for array in (passed.keys, passed.values) if array is not None))
        return [self._arrays(model, passed, index, row, prefix) for index, row in enumerate(group)]

    def _arrays(self, model: Model, passed: Activations, index: int, row: Tokens, prefix: _Prefix) -> list[Array]:
        """What is kept of one example of a group."""
        tokens, behind = len(row) - 1, self.layer >= self.config.num_ordinary_layers
        if behind:
            x_TD = passed.x[index, : len(self._outputs(row))]
        else:
            x_TD = passed.x[index, : tokens - prefix.length]
            if prefix.x_TD is not None:
                x_TD = mx.concatenate([prefix.x_TD, x_TD])
        if not self.keeps_keys:
            return [_to_numpy(x_TD)]
        pair = [
            array[index, :, :tokens].transpose(1, 0, 2) for array in (passed.keys, passed.values) if array is not None
        ]
        if not self.config.kv_quant:
            return [_to_numpy(x_TD), *map(_to_numpy, pair)]
        last = model.model.layers[-1].self_attn
        steps = mx.stack([last.quant_key_scale, last.quant_value_scale]).astype(mx.float32)
        numbers = [np.array(to_int8(array, step)) for array, step in zip(pair, steps)]
        return [_to_numpy(x_TD), *numbers, np.array(steps)]

    def _outputs(self, row: Tokens) -> Array:
        """Indices of the tokens whose predictions are trained; the last one if none is."""
        outputs = np.flatnonzero(row.weights[1:])
        return outputs if len(outputs) else np.array([len(row) - 2])

    def _stream_places(self, row: Tokens, place: Array) -> Array:
        """Where the kept rows of the stream belong: all tokens of the example, or its trained positions."""
        return place if self.layer < self.config.num_ordinary_layers else place[self._outputs(row)]

    def _shared(self, rows: Sequence[Array], first: int) -> int:
        """How many tokens are computed as a prefix: the first turn if all have the same, before anything trained."""
        if self._prefix_end_id is None:
            return 0
        ends = np.flatnonzero(rows[0][:first] == self._prefix_end_id)
        if not len(ends):
            return 0
        count = int(ends[0]) + 1
        return count if all(np.array_equal(row[:count], rows[0][:count]) for row in rows) else 0

    def _prefix(self, model: Model, ids: Array) -> _Prefix:
        key = ids.tobytes()
        if (found := self._prefixes.get(key)) is None:
            caches, x_TD = model.make_cache(), None
            if len(ids):
                stop = min(self.layer, self.config.num_ordinary_layers)
                last = mx.array([[len(ids) - 1]]) if self.layer >= stop == self.config.num_ordinary_layers else None
                x_TD = model.activations(mx.array(ids[None]), stop, cache=caches, output_positions=last).x[0]
                mx.eval(x_TD, [cache.state[:2] for cache in caches if not cache.empty()])
            found = self._prefixes[key] = _Prefix(caches, x_TD, len(ids))
            for old in list(self._prefixes)[:-PREFIXES]:
                del self._prefixes[old]
        return found


def _grouped(data: Sequence[Tokens], names: Sequence[bytes]) -> dict[bytes, _Group]:
    """The group of each example of a split: neighbours by length, as many as a group may have."""
    lengths = [len(row) - 1 for row in data]
    order = sorted(range(len(data)), key=lambda index: (lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        tokens = lengths[index] * (len(groups[-1]) + 1) if groups else 0
        if groups and len(groups[-1]) < GROUP and tokens <= GROUP_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    found: dict[bytes, _Group] = {}
    for indices in groups:
        group = _Group(data, tuple(indices), hashlib.sha256(b"".join(names[index] for index in indices)).digest())
        for index in indices:
            found.setdefault(names[index], group)
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
