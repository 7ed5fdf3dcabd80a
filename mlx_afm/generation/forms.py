"""The decoder of a model: its inference form, made when it is first needed and again when the weights changed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_afm.adapters.inference import AdapterStacks, own_weights
from mlx_afm.generation.decode import Decoder
from mlx_afm.model import Model
from mlx_afm.model.inference import InferenceModel, held_arrays, same_arrays
from mlx_afm.model.low_rank import Routes

OWN = ""  # the name of the adapter that is on a model itself


@dataclass(frozen=True)
class ModelDecoder:
    """A decoder of a model with the adapter that is on it.

    Attributes:
        decoder: of its inference form.
        route: what that adapter adds; empty if there is none.
        arrays: the model's, which tell whether it is still the same.
    """

    decoder: Decoder
    route: Routes
    arrays: list[mx.array]

    def routes(self, names: Sequence[str | None]) -> Routes:
        """What rows add, which all have the model's own adapter."""
        return self.route


_decoders: dict[int, ModelDecoder] = {}


def decoder_of(model: Model) -> ModelDecoder:
    """The decoder of a model as `mlx_afm.load` gives it.

    Cost: the first time, see `InferenceModel`, and a copy of the adapter in the model's dtype; afterwards, a look at
        each array. Weights that were replaced since (training, fusing, another adapter) give a new decoder, and the old
        one's memory is free again.
    """
    held = _decoders.get(id(model))
    if held is not None and same_arrays(model, held.arrays):
        return held
    if held is None:
        weakref.finalize(model, _decoders.pop, id(model), None)
    _decoders.pop(id(model), None)
    form = InferenceModel(model)
    stacks, own = AdapterStacks(form), own_weights(model)
    if own is not None:
        stacks.add(OWN, *own)
    made = ModelDecoder(Decoder(form), stacks.routes([OWN]), held_arrays(model))
    _decoders[id(model)] = made
    return made
