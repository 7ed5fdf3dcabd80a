"""Attention of both kinds of layers.

Shape suffixes: B batch, L tokens, N tokens that are read, S keys, D model width, H query heads,
K key heads, E head width, G groups of queries that share their keys. With a cache, one token of each row
is (B, D) instead of (B, 1, D): a step of an answer then needs neither transposes nor reshapes around its products.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model import backend
from mlx_afm.model.attention_context import AttentionContext, take_rows
from mlx_afm.model.config import AFMConfig
from mlx_afm.model.layers import RMSNorm, fake_quantize, rotate, rotate_in_training
from mlx_afm.model.projections import FusedLinear, Linear
from mlx_afm.model.recompute import gradient_barrier, recomputed


def _heads(norm: RMSNorm, x_BND: mx.array, context: AttentionContext, width: int, groups: int) -> mx.array:
    """Queries or keys rotated and normed per head, (G, H, N, E)."""
    turn = rotate_in_training if norm.training else rotate
    batch, pairs = x_BND.shape[0], (width // 2, 2)
    if x_BND.ndim == 2:  # heads and their only tokens lie in either order
        return norm(turn(x_BND.reshape(batch, -1, 1, *pairs), context.cos, context.sin).reshape(batch, -1, 1, width))
    length = x_BND.shape[1]
    x_BNHE = turn(x_BND.reshape(batch, length, -1, *pairs), context.cos, context.sin)
    return norm(x_BNHE.reshape(groups, batch * length // groups, -1, width)).transpose(0, 2, 1, 3)


def _attend(norm: RMSNorm, q_BND: mx.array, k_BKSE: mx.array, v_BKSE: mx.array, context: AttentionContext) -> mx.array:
    """Rotates and norms queries per head, and attends to the keys that the context has: (B, N, D), as they came.

    Cost: neither the scores nor the keys of each group of queries are kept for the backward pass, but made again.
    """
    width = k_BKSE.shape[-1]

    def attend(q_BND: mx.array, k_BKSE: mx.array, v_BKSE: mx.array) -> mx.array:
        k_GKSE, v_GKSE = context.of(k_BKSE), context.of(v_BKSE)
        q_GHNE = _heads(norm, q_BND, context, width, k_GKSE.shape[0])
        out_GHNE = backend.attention(q_GHNE, k_GKSE, v_GKSE, scale=width**-0.5, mask=context.mask)
        return (out_GHNE if q_BND.ndim == 2 else out_GHNE.transpose(0, 2, 1, 3)).reshape(q_BND.shape)

    return recomputed([norm], attend, q_BND, k_BKSE, v_BKSE)


class Attention(nn.Module):
    """Attention of an ordinary layer: it makes queries, keys and values."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = FusedLinear(config.hidden_dim, config.hidden_dim, config.kv_dim)
        self.out_proj = Linear(config.hidden_dim, config.hidden_dim)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        if config.kv_quant:
            self.quant_key_scale = mx.array(1.0)
            self.quant_value_scale = mx.array(1.0)

    def __call__(
        self,
        x_BLD: mx.array,
        norm: RMSNorm,
        context: AttentionContext,
        cache: Any = None,
        output_positions_BN: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x + output, and the keys and values it attended to (the cache's older ones included).

        Order: norm, project, rotate q and k, norm q and k per head, fake-quantize k and v, cache, attend.
        With `output_positions_BN` queries and output are computed at those indices only.

        Shapes: x and output (B, L or N, D), or (B, D) of one token; keys and values (B, K, S, E).
        """

        def project(x_BLD: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            normed = norm(x_BLD)
            return self.qkv_proj(
                normed, None if output_positions_BN is None else take_rows(normed, output_positions_BN)
            )

        q, k, v = recomputed([norm, self.qkv_proj], project, x_BLD)
        batch, width = x_BLD.shape[0], self.config.head_dim
        k = _heads(self.k_norm, k, context, width, batch)
        if v.ndim == 2:
            v = v.reshape(batch, -1, 1, width)
        else:
            v = v.reshape(batch, v.shape[1], -1, width).transpose(0, 2, 1, 3)
        if self.config.kv_quant:
            k = fake_quantize(k, self.quant_key_scale, training=self.training)
            v = fake_quantize(v, self.quant_value_scale, training=self.training)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if output_positions_BN is not None:
            context = context.at(output_positions_BN, x_BLD.shape[1], k.shape[2])
        residual = x_BLD if output_positions_BN is None else take_rows(x_BLD, output_positions_BN)
        return self.out_proj.plus(_attend(self.q_norm, q, k, v, context), residual), k, v


class KVReuseAttention(nn.Module):
    """Attention of a layer that makes queries only and reads the last ordinary layer's keys and values."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.q_proj = Linear(config.hidden_dim, config.hidden_dim)
        self.out_proj = Linear(config.hidden_dim, config.hidden_dim)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(
        self, x_BLD: mx.array, norm: RMSNorm, context: AttentionContext, k_BKSE: mx.array, v_BKSE: mx.array
    ) -> mx.array:
        """x + output (B, L, D); `norm` comes before the projection."""
        q = recomputed([norm, self.q_proj], lambda x: self.q_proj(norm(x)), x_BLD)
        if self.training:
            q, k_BKSE, v_BKSE = gradient_barrier(q, k_BKSE, v_BKSE)  # type: ignore
        return self.out_proj.plus(_attend(self.q_norm, q, k_BKSE, v_BKSE, context), x_BLD)
