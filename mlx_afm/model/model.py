"""AFM text v7: ordinary layers, then layers that reuse the last ordinary layer's keys and values.

Module names are those of mlx-lm's `afm7`, so its dense weights load here and ours load there.

Shape suffixes: B batch, L tokens, N tokens that are read, S keys, D model width, K key heads,
E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.errors import ConfigError
from mlx_afm.model.attention import Attention, KVReuseAttention, View, full_view, needed_view, take_rows
from mlx_afm.model.cache import KVCache
from mlx_afm.model.config import AFMConfig
from mlx_afm.model.layers import FeedForward, RMSNorm


class OrdinaryLayer(nn.Module):
    """Attention with keys and values of its own, then feed-forward; pre-norm, residual."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(
        self, x_BLD: mx.array, view: View, cache: Any = None, needed_BN: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Output at all tokens, or at the needed ones only; and the keys and values."""
        y, k, v = self.self_attn(self.input_layernorm(x_BLD), view, cache, needed_BN)
        x = (x_BLD if needed_BN is None else take_rows(x_BLD, needed_BN)) + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class KVReuseLayer(nn.Module):
    """Attention to given keys and values, then feed-forward; pre-norm, residual."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.self_attn = KVReuseAttention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(self, x_BLD: mx.array, view: View, k_BKSE: mx.array, v_BKSE: mx.array) -> mx.array:
        """Output at every token of x."""
        x = x_BLD + self.self_attn(self.input_layernorm(x_BLD), view, k_BKSE, v_BKSE)
        return x + self.mlp(self.post_attention_layernorm(x))


class AFMModel(nn.Module):
    """Embedding, both kinds of layers, final norm: tokens to hidden states."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = [OrdinaryLayer(config) for _ in range(config.num_ordinary_layers)]
        self.kv_reuse_layers = [KVReuseLayer(config) for _ in range(config.num_kv_reuse_layers)]
        self.output_norm = RMSNorm(config.hidden_dim, config.rms_norm_eps)

    def __call__(
        self,
        tokens_BL: mx.array,
        cache: Sequence[Any] | None = None,
        positions_BL: mx.array | None = None,
        documents_BL: mx.array | None = None,
        needed_BN: mx.array | None = None,
    ) -> mx.array:
        """Final hidden states; see `Model.hidden`."""
        x = self.embedding(tokens_BL)
        length = tokens_BL.shape[1]
        caches = [None] * len(self.layers) if cache is None else list(cache)
        if len(caches) != len(self.layers):
            raise ConfigError("wrong number of caches", expected=len(self.layers), found=len(caches))
        view = full_view(
            self.config, x.dtype, length, positions_BL=positions_BL, documents_BL=documents_BL, cache=caches[0]
        )
        for layer, layer_cache in zip(self.layers[:-1], caches):
            x, _, _ = layer(x, view, layer_cache)
        x, k, v = self.layers[-1](x, view, caches[-1], needed_BN)
        if needed_BN is not None:
            view = needed_view(view, needed_BN, length, k.shape[2])
        for layer in self.kv_reuse_layers:
            x = layer(x, view, k, v)
        return self.output_norm(x)


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
        needed: mx.array | None = None,
    ) -> mx.array:
        """Hidden states after the final norm.

        Args:
            tokens_BL: int (B, L).
            cache: one cache per ordinary layer, from `make_cache`; excludes `documents`.
            positions: int (B, L), where each token stands; a token sees tokens of its document at
                positions up to its own.
            documents: int (B, L), which document of a packed row each token belongs to; documents
                do not see each other, and padding is a document of its own. Positions then default
                to the place within the document.
            needed: int (B, N), indices into L whose outputs anyone will read; the rest of the last
                ordinary layer and of all later layers is then not computed. Exact.

        Returns: (B, L, D), or (B, N, D) with `needed`.
        Raises: ConfigError for a wrong number of caches, or for documents together with a cache.
        """
        if cache is not None and documents is not None:
            raise ConfigError("a cache holds one document per row", advice="Pass either cache or documents.")
        return self.model(tokens_BL, cache, positions, documents, needed)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of hidden states (..., D): the product with the embedding."""
        return self.head.as_linear(hidden)

    @property
    def head(self) -> nn.Embedding:
        """The module that makes logits: the embedding, whose weight is also the output matrix."""
        return self.model.embedding

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[KVCache]:
        """One empty cache per ordinary layer; `left_padding` says how much padding each row starts with."""
        return [KVCache(left_padding) for _ in self.model.layers]

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, ordinary ones first. There are fewer caches than layers."""
        return [*self.model.layers, *self.model.kv_reuse_layers]
