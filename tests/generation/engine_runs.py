"""Runs of the engine on small models, and models that are rigged."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.generation import Engine, GenerateConfig, Request
from mlx_afm.generation.decode import Decoder
from mlx_afm.generation.forms import decoder_of
from mlx_afm.model import Model

PLACES = 1200  # longest prompt and answer that a rigged model knows about


def engine_of(model, *, compiled=False, plain_steps=0, **options):
    """An engine on a model with the adapter that is on it."""
    held = decoder_of(model)
    decoder = Decoder(held.decoder.form, compiled=compiled, plain_steps=plain_steps)
    return Engine(decoder, routes=held.routes, **options)


def events_of(engine, requests=()):
    """What an engine gives for requests until it is done: all events."""
    for request in requests:
        engine.add(request)
    events = []
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            events.append(event)
    return events


def answers(engine, requests):
    """The tokens of each request's answer."""
    rows = [row for request in requests for row in engine.add(request)]
    events_of(engine)
    return [row.tokens for row in rows]


def answer(model, ids, config=None, *, max_tokens=None, **options):
    """The tokens of one answer of a model alone, in an engine of its own."""
    names = ("logits_processors", "stop_token_ids", "adapter", "prefix_boundaries", "samplers")
    request = {name: options.pop(name) for name in names if name in options}
    config = config or GenerateConfig()
    return answers(engine_of(model, **options), [Request(ids=ids, config=config, max_tokens=max_tokens, **request)])[0]


class Spoiled(Model):
    """A model that names another token than it would, behind some places of prompt and answer."""

    def __call__(self, tokens_BL, cache=None):
        places = cache[0].offset[:, None] + mx.arange(tokens_BL.shape[1])
        logits = super().__call__(tokens_BL, cache)
        return mx.where(self.right[places][..., None], logits, mx.roll(logits, 1, axis=-1))


def spoiled(model, right):
    """A draft for a model that is right where `right(place)` says so of the place of the token, prompt included."""
    copy = Spoiled(model.args)
    copy.load_weights(tree_flatten(model.parameters()))
    copy.right = mx.array([bool(right(place + 1)) for place in range(PLACES)])
    return copy


class Chain(Model):
    """A model for which the next token depends on the last one alone: logits (V, V), for ids modulo V."""

    def __call__(self, tokens_BL, cache=None):
        super().__call__(tokens_BL, cache)
        return self.table[tokens_BL % len(self.table)]

    def next_logits(self, tokens_BL, cache=None):
        super().next_logits(tokens_BL, cache)
        return self.table[tokens_BL[:, -1] % len(self.table)]


def chain(table, **sizes):
    """A chain with this table."""
    from tiny import tiny_config

    model = Chain(tiny_config(num_layers=1, num_kv_reuse_layers=0, hidden_dim=8, num_heads=2, num_kv_heads=1, **sizes))
    model.table = mx.array(table, mx.float32)
    mx.eval(model.parameters())
    return model
