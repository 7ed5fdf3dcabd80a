"""One step of all rows of a batch: tokens and caches to logits, compiled where that pays.

Both ways run the same function. Compiled, it is traced once for each shape (rows of the storage, its room, tokens a
row, the adapters' matrices). Tokens, caches, adapters and steps of quantizers are its inputs; the weights of the
inference form are its constants, since no form ever gets others (`forms.decoder_of` makes a new one).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_afm.generation.batch_cache import BatchCache
from mlx_afm.model import backend
from mlx_afm.model.inference import InferenceModel
from mlx_afm.model.low_rank import Routes
from mlx_afm.model.row_cache import RowKVCache

PLAIN_STEPS = 16  # before the first compiled one of an answer: a short one never pays for a trace
SWITCH = "MLX_AFM_COMPILE"  # environment: 1 compiles on every device, 0 on none


@dataclass
class Counters:
    """What was run, for tests and metrics.

    Attributes:
        plain_steps, compiled_steps: steps of either way.
        traces: times that the compiled function was traced.
    """

    plain_steps: int = 0
    compiled_steps: int = 0
    traces: int = 0


def compiles_by_default() -> bool:
    """Whether steps are compiled unless someone says otherwise: on a GPU.

    On the CPU backend the first trace of a process calls a C++ compiler for seconds, which only long runs win back
    (docs/generation.md).
    """
    switch = os.environ.get(SWITCH, "")
    if switch in ("0", "1"):
        return switch == "1"
    return not backend.on_cpu()


@dataclass
class Decoder:
    """Runs steps of one model.

    Attributes:
        form: the model in its inference form.
        compiled: whether steps are compiled; None asks `compiles_by_default`.
        plain_steps: how many steps of a batch run as they are before compiled ones.
        counters: what was run.
    """

    form: InferenceModel
    compiled: bool | None = None
    plain_steps: int = PLAIN_STEPS
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        if self.compiled is None:
            self.compiled = compiles_by_default()
        self._functions: dict[bool, Any] = {}

    def new_cache(self, *, quantized: bool = False) -> BatchCache:
        """An empty batch, in the form that the steps want."""
        return BatchCache(self.form.model, quantized=quantized, padded_rows=bool(self.compiled))

    def prefill(
        self, tokens_1L: mx.array, caches: Sequence[Any], routes: Routes, *, logits: bool = True
    ) -> mx.array | None:
        """Logits (1, V) after the last of some tokens of one prompt, whose keys and values the caches take.

        Args:
            caches: from `make_cache`; what they hold comes before the tokens.
            routes: the adapter of the prompt.
            logits: without them only what the caches need is computed, once they are evaluated.

        Cost: layers that reuse keys and values, and the head, are computed for the last token alone.
        """
        model = self.form.model
        self.form.routing.routes = routes
        try:
            return model.next_logits(tokens_1L, caches) if logits else model.hidden(tokens_1L, cache=caches)
        finally:
            self.form.routing.routes = ()

    def hidden(self, tokens_1L: mx.array, caches: Sequence[Any], routes: Routes) -> mx.array:
        """Final hidden states (L, D) of some tokens of one prompt, whose keys and values the caches take."""
        self.form.routing.routes = routes
        try:
            return self.form.model.hidden(tokens_1L, cache=caches)[0]
        finally:
            self.form.routing.routes = ()

    def step(self, tokens_BL: mx.array, cache: BatchCache, routes: Routes, *, steps_done: int) -> mx.array:
        """Logits (B, L, V) after tokens that follow what the rows hold; these are stored, lengths stay as they are.

        Args:
            tokens_BL: int32, of every row of the storage.
            cache: has room for them.
            routes: the adapters of the rows, see `adapters.inference`.
            steps_done: by the batch so far, which decides whether this one is compiled.
        """
        length = tokens_BL.shape[1]
        cache.reserve(max(cache.lengths) + length)
        arguments = tokens_BL, cache.offsets, cache.keys, cache.values
        if self.compiled and steps_done >= self.plain_steps:
            self.counters.compiled_steps += 1
            if cache.quantized not in self._functions:
                self._functions[cache.quantized] = _compiled_step(self.form, self.counters, cache.quantized)
            step = self._functions[cache.quantized]
            compiled = step(*arguments, self.form.quantizer_steps, list(routes))
            logits: mx.array
            logits, cache.keys, cache.values = compiled
            return logits
        self.counters.plain_steps += 1
        visible = max(cache.lengths) + length
        logits, cache.keys, cache.values = _step(
            self.form, *arguments, routes, quantized=cache.quantized, visible=visible
        )
        return logits


def _compiled_step(form: InferenceModel, counters: Counters, quantized: bool) -> Any:
    """`_step` as a compiled function. It refers to no decoder, so that dropping the decoder frees it at once."""

    def traced(tokens: Any, offsets: Any, keys: Any, values: Any, steps: Any, routes: Any) -> Any:
        counters.traces += 1
        with form.with_quantizer_steps(steps):
            return _step(form, tokens, offsets, keys, values, routes, quantized=quantized, visible=None)

    return mx.compile(traced)


def _step(
    form: InferenceModel,
    tokens_BL: mx.array,
    offsets_B: mx.array,
    keys: list[mx.array],
    values: list[mx.array],
    routes: Routes,
    *,
    quantized: bool,
    visible: int | None,
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """Logits and the storage with the tokens in it; `visible` as in `RowKVCache`."""
    steps = form.quantizer_steps if quantized else [None] * len(keys)
    caches = [RowKVCache(k, v, offsets_B, steps=step, visible=visible) for k, v, step in zip(keys, values, steps)]
    form.routing.routes = routes
    try:
        logits = form.model(tokens_BL, caches)
    finally:
        form.routing.routes = ()
    return logits, [cache.keys for cache in caches], [cache.values for cache in caches]
