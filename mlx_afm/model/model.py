"""AFM text v7: ordinary layers, then layers that reuse the last ordinary layer's keys and values.

Module names are those of mlx-lm's `afm7`, so its dense weights load here and ours load there.

Shape suffixes: B batch, L tokens, N tokens that are read, S keys, D model width, K key heads,
E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.errors import ConfigError
from mlx_afm.model.attention import Attention, KVReuseAttention
from mlx_afm.model.attention_context import AttentionContext, Packing, full_context, packed_context
from mlx_afm.model.cache import Int8KVCache, KVCache
from mlx_afm.model.config import AFMConfig
from mlx_afm.model.layers import FeedForward, RMSNorm
from mlx_afm.model.projections import Embedding
from mlx_afm.model.recompute import recomputed


class DecoderLayer(nn.Module):
    """Attention with keys and values of its own, then feed-forward; pre-norm, residual."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(
        self, x_BLD: mx.array, context: AttentionContext, cache: Any = None, output_positions_BN: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Output at all tokens, or at the output positions only; and the keys and values."""
        x, k, v = self.self_attn(x_BLD, self.input_layernorm, context, cache, output_positions_BN)
        return self.mlp(x, self.post_attention_layernorm), k, v


class KVReuseDecoderLayer(nn.Module):
    """Attention to given keys and values, then feed-forward; pre-norm, residual."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.self_attn = KVReuseAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(self, x_BLD: mx.array, context: AttentionContext, k_BKSE: mx.array, v_BKSE: mx.array) -> mx.array:
        """Output at every token of x."""
        x = self.self_attn(x_BLD, self.input_layernorm, context, k_BKSE, v_BKSE)
        return self.mlp(x, self.post_attention_layernorm)


@dataclass(frozen=True)
class Activations:
    """The residual stream between two layers: what the layers above need of those below.

    Attributes:
        layer: how many layers it has passed.
        x: float (B, L, D) at all tokens; from the last ordinary layer on (B, N, D), at the output positions.
        keys, values: (B, K, S, E) of the last ordinary layer; None before it.
    """

    layer: int
    x: mx.array
    keys: mx.array | None = None
    values: mx.array | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What `Model.hidden` was asked for besides the tokens; its arguments say what each means."""

    cache: Sequence[Any] | None = None
    positions_BL: mx.array | None = None
    documents_BL: mx.array | None = None
    subtree_end_BL: mx.array | None = None
    packing: Packing | None = None
    output_positions_BN: mx.array | None = None
    grad_checkpoint: bool = False
    activations: Activations | None = None


class AFMModel(nn.Module):
    """Embedding, both kinds of layers, final norm: tokens to hidden states."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_dim)
        self.layers = [DecoderLayer(config) for _ in range(config.num_ordinary_layers)]
        self.kv_reuse_layers = [KVReuseDecoderLayer(config) for _ in range(config.num_kv_reuse_layers)]
        self.output_norm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(self, tokens_BL: mx.array, call: Call) -> mx.array:
        """Final hidden states; see `Model.hidden`."""
        one_token = call.cache is not None and call.output_positions_BN is None and tokens_BL.shape[1] == 1
        passed = self.run_layers(tokens_BL, call, self.config.num_layers, one_token=one_token)
        x = self.output_norm(passed.x)
        return x[:, None] if one_token else x

    def run_layers(self, tokens_BL: mx.array, call: Call, stop: int, *, one_token: bool = False) -> Activations:
        """The residual stream behind the first `stop` layers, starting from `call.activations` if there are any."""
        given, output_positions_BN = call.activations, call.output_positions_BN
        if given is None:
            given = Activations(0, self.embedding(tokens_BL[:, 0] if one_token else tokens_BL))
        length, ordinary = tokens_BL.shape[1], len(self.layers)
        caches = [None] * ordinary if call.cache is None else list(call.cache)
        if len(caches) != ordinary:
            raise ConfigError("wrong number of caches", expected=ordinary, found=len(caches))
        x, k, v = given.x, given.keys, given.values
        tables = x.dtype if self.training else mx.float32  # one kernel rotates in inference, and rounds once
        context = self._context(tables, length, call, caches[0])

        def run(layer: nn.Module, function: Callable[..., Any], *arrays: mx.array) -> Any:
            return recomputed([layer], function, *arrays) if call.grad_checkpoint else function(*arrays)

        for number in range(given.layer, min(stop, ordinary - 1)):
            layer, cache = self.layers[number], caches[number]
            x = run(layer, lambda x, layer=layer, cache=cache: layer(x, context, cache)[0], x)
        if given.layer < ordinary <= stop:
            x, k, v = run(self.layers[-1], lambda x: self.layers[-1](x, context, caches[-1], output_positions_BN), x)
        if k is not None and v is not None and stop > ordinary:
            read = context if output_positions_BN is None else context.at(output_positions_BN, length, k.shape[2])
            for layer in self.kv_reuse_layers[max(0, given.layer - ordinary) : stop - ordinary]:
                x = run(layer, lambda x, k, v, layer=layer: layer(x, read, k, v), x, k, v)
        return Activations(stop, x, k, v)

    def _context(self, dtype: mx.Dtype, length: int, call: Call, cache: Any) -> AttentionContext:
        if call.packing is not None:
            return packed_context(self.config, dtype, call.packing)
        return full_context(
            self.config,
            dtype,
            length,
            positions_BL=call.positions_BL,
            documents_BL=call.documents_BL,
            subtree_end_BL=call.subtree_end_BL,
            cache=cache,
        )


class Model(nn.Module):
    """AFM text v7 with its tied head; satisfies mlx-lm's model protocol.

    Args:
        args: sizes of the model (the attribute keeps mlx-lm's name).
    """

    def __init__(self, args: AFMConfig) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = AFMModel(args)

    def __call__(self, tokens_BL: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Logits (B, L, V) of the token after each token, in the dtype of the weights."""
        return self.logits(self.hidden(tokens_BL, cache=cache))

    def hidden(
        self,
        tokens_BL: mx.array,
        *,
        cache: Sequence[Any] | None = None,
        positions: mx.array | None = None,
        documents: mx.array | None = None,
        subtree_end: mx.array | None = None,
        packing: Packing | None = None,
        output_positions: mx.array | None = None,
        grad_checkpoint: bool = False,
        activations: Activations | None = None,
    ) -> mx.array:
        """Hidden states after the final norm.

        Args:
            tokens_BL: int (B, L).
            cache: one cache per ordinary layer, from `make_cache`; excludes documents and packing.
            positions: int (B, L), where each token stands; a token sees tokens of its document at
                positions up to its own.
            documents: int (B, L), which document of a packed row each token belongs to; documents
                do not see each other, and padding is a document of its own. Positions then default
                to the place within the document.
            subtree_end: int (B, L), for documents that begin with others: the last document that reads
                this token, documents being numbered in preorder of the tree of prefixes. Needs positions.
            packing: the same in the form that costs least, see `Packing`; instead of the three above.
            output_positions: int (B, N), indices into L whose outputs anyone will read; the rest of the last
                ordinary layer and of all later layers is then not computed. Exact.
            grad_checkpoint: keep one array per layer for the backward pass, and K and V of the last ordinary
                layer, and compute everything else again: about a third more time.
            activations: of the layers below, from `activations` with the same tokens; these are then not computed.

        Returns: (B, L, D), or (B, N, D) with `output_positions`.
        Raises: ConfigError for a wrong number of caches, or arguments that exclude each other.
        """
        placed = [array is not None for array in (positions, documents, subtree_end)]
        if cache is not None and (documents is not None or packing is not None):
            raise ConfigError("a cache holds one document per row", advice="Pass either cache or documents.")
        if cache is not None and grad_checkpoint:
            raise ConfigError("a cache cannot be checkpointed", advice="Train without a cache.")
        if packing is not None and any(placed):
            raise ConfigError("packing says where tokens stand", advice="Pass no positions or documents besides.")
        if subtree_end is not None and not all(placed):
            raise ConfigError("subtree_end needs positions and documents")
        call = Call(
            cache=cache,
            positions_BL=positions,
            documents_BL=documents,
            subtree_end_BL=subtree_end,
            packing=packing,
            output_positions_BN=output_positions,
            grad_checkpoint=grad_checkpoint,
            activations=activations,
        )
        return self.model(tokens_BL, call)

    def activations(
        self,
        tokens_BL: mx.array,
        layer: int,
        *,
        cache: Sequence[Any] | None = None,
        output_positions: mx.array | None = None,
    ) -> Activations:
        """The residual stream behind the first `layer` layers, for `hidden` to go on from.

        Args:
            tokens_BL, cache, output_positions: see `hidden`.
            layer: from 0, behind the embedding, to `num_layers`, before the final norm.

        Raises: ConfigError for a layer that the model does not have, or a wrong number of caches.
        """
        if not 0 <= layer <= self.args.num_layers:
            raise ConfigError("no such layer", expected=f"0 to {self.args.num_layers}", found=layer)
        call = Call(cache=cache, output_positions_BN=output_positions)
        return self.model.run_layers(tokens_BL, call, layer)

    def next_logits(self, tokens_BL: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Logits (B, V) of the token after the last one; what they do not depend on is not computed."""
        batch, length = tokens_BL.shape
        last = None if length == 1 else mx.full((batch, 1), length - 1)
        return self.logits(self.hidden(tokens_BL, cache=cache, output_positions=last)[:, -1])

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D): the product with the embedding."""
        return self.head.as_linear(hidden)

    @property
    def head(self) -> nn.Embedding:
        """The module that makes logits: the embedding, whose weight is also the output matrix."""
        return self.model.embedding

    def make_cache(self, left_padding: Sequence[int] | None = None, *, quantized: bool = False) -> list[KVCache]:
        """One empty cache per ordinary layer.

        Args:
            left_padding: how much padding each row starts with.
            quantized: hold keys and values as the int8 numbers that the model rounds them to: half the
                memory of 16 bits, and the same output to the last bit.

        Raises: ConfigError if the model does not round keys and values.
        """
        if not quantized:
            return [KVCache(left_padding) for _ in self.model.layers]
        if not self.args.kv_quant:
            raise ConfigError("a model without key and value quantizers has no 8-bit cache")
        attentions = [layer.self_attn for layer in self.model.layers]
        return [Int8KVCache(at.quant_key_scale, at.quant_value_scale, left_padding) for at in attentions]

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, ordinary ones first. There are fewer caches than layers."""
        return [*self.model.layers, *self.model.kv_reuse_layers]
