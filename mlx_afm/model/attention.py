"""Attention of both kinds of layers, and who may see whom.

Shape suffixes: B batch, L tokens, N tokens that are read, S keys, D model width, H query heads,
K key heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_afm.model.config import AFMConfig
from mlx_afm.model.layers import FusedLinear, Linear, RMSNorm, fake_quantize, rotary_tables, rotate

Mask = mx.array | str | None


@dataclass(frozen=True)
class View:
    """Queries at some positions: how to rotate them and what they see.

    Attributes:
        cos, sin: rotary tables, (B or 1, L, 1, E / 2).
        mask: None (all keys), "causal", or bool (B or 1, 1, L, S).
    """

    cos: mx.array
    sin: mx.array
    mask: Mask


def visible_mask(positions_BL: mx.array, documents_BL: mx.array | None) -> mx.array:
    """Bool (B, 1, L, L): token j is visible to i iff same document and position j <= position i."""
    visible = positions_BL[:, None, :, None] >= positions_BL[:, None, None, :]
    if documents_BL is not None:
        visible = visible & (documents_BL[:, None, :, None] == documents_BL[:, None, None, :])
    return visible


def positions_in_documents(documents_BL: mx.array) -> mx.array:
    """Position of each token within its document, counted from 0 also if the document is interrupted."""
    same = documents_BL[:, :, None] == documents_BL[:, None, :]
    earlier = mx.tril(mx.ones(same.shape[1:], dtype=mx.bool_), k=-1)
    return mx.sum(same & earlier, axis=-1).astype(mx.int32)


def full_view(
    config: AFMConfig,
    dtype: mx.Dtype,
    length: int,
    *,
    positions_BL: mx.array | None,
    documents_BL: mx.array | None,
    cache: Any,
) -> View:
    """The view of all tokens of a call.

    Positions come from the caller, else from the documents, else from the cache's offset, else
    they are 0, 1, 2, ...; the mask follows from the same source.
    """
    if cache is not None:
        mask = cache.make_mask(length, return_array=False, window_size=None)
        if positions_BL is None:
            start = cache.offset
            start = mx.array([start]) if isinstance(start, int) else start
            positions_BL = start[:, None] + mx.arange(length)
    elif positions_BL is None and documents_BL is None:
        positions_BL, mask = mx.arange(length)[None], "causal"
    else:
        if positions_BL is None:
            assert documents_BL is not None
            positions_BL = positions_in_documents(documents_BL)
        mask = visible_mask(positions_BL, documents_BL)
    return View(*rotary_tables(positions_BL, config, dtype), mask)


def needed_view(view: View, needed_BN: mx.array, length: int, keys: int) -> View:
    """The view of the tokens at indices `needed_BN` only; `keys` is how many keys there are."""
    return View(
        take_rows(view.cos, needed_BN), take_rows(view.sin, needed_BN), _mask_rows(view.mask, needed_BN, length, keys)
    )


def take_rows(array: mx.array, needed_BN: mx.array) -> mx.array:
    """Rows `needed_BN` of axis 1, (B or 1, L, ...) to (B, N, ...)."""
    if array.shape[0] != needed_BN.shape[0]:
        array = mx.broadcast_to(array, (needed_BN.shape[0], *array.shape[1:]))
    index = needed_BN.reshape(*needed_BN.shape, *(1,) * (array.ndim - 2))
    return mx.take_along_axis(array, index, axis=1)


def _mask_rows(mask: Mask, needed_BN: mx.array, length: int, keys: int) -> Mask:
    if mask is None:
        return None
    if isinstance(mask, str):
        columns = mx.arange(keys) - (keys - length)  # index within this call; negative for cached keys
        return columns <= needed_BN[:, None, :, None]
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mx.expand_dims(take_rows(mx.squeeze(mask, 1), needed_BN), 1)


def _attend(q_BNHE: mx.array, k_BKSE: mx.array, v_BKSE: mx.array, mask: Mask) -> mx.array:
    batch, length, heads, width = q_BNHE.shape
    q_BHNE = q_BNHE.transpose(0, 2, 1, 3)
    out = mx.fast.scaled_dot_product_attention(q_BHNE, k_BKSE, v_BKSE, scale=width**-0.5, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)


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
        self, x_BLD: mx.array, view: View, cache: Any = None, needed_BN: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Output, and the keys and values it attended to (the cache's older ones included).

        Order: project, rotate q and k, norm q and k per head, fake-quantise k and v, cache, attend.
        With `needed_BN` queries and output are computed at those indices only.

        Shapes: output (B, L or N, D); keys and values (B, K, S, E).
        """
        batch, length, _ = x_BLD.shape
        config = self.config
        x_queries = None if needed_BN is None else take_rows(x_BLD, needed_BN)
        q, k, v = self.qkv_proj(x_BLD, x_queries)
        k = self.k_norm(rotate(k.reshape(batch, length, config.num_kv_heads, -1), view.cos, view.sin))
        k, v = k.transpose(0, 2, 1, 3), v.reshape(batch, length, config.num_kv_heads, -1).transpose(0, 2, 1, 3)
        if config.kv_quant:
            k = fake_quantize(k, self.quant_key_scale)
            v = fake_quantize(v, self.quant_value_scale)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if needed_BN is not None:
            view = needed_view(view, needed_BN, length, k.shape[2])
        q = self.q_norm(rotate(q.reshape(batch, q.shape[1], config.num_heads, -1), view.cos, view.sin))
        return self.out_proj(_attend(q, k, v, view.mask)), k, v


class KVReuseAttention(nn.Module):
    """Attention of a layer that makes queries only and reads the last ordinary layer's keys and values."""

    def __init__(self, config: AFMConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = Linear(config.hidden_dim, config.hidden_dim)
        self.out_proj = Linear(config.hidden_dim, config.hidden_dim)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x_BLD: mx.array, view: View, k_BKSE: mx.array, v_BKSE: mx.array) -> mx.array:
        """Output (B, L, D)."""
        q = self.q_proj(x_BLD).reshape(*x_BLD.shape[:2], self.config.num_heads, -1)
        q = self.q_norm(rotate(q, view.cos, view.sin))
        return self.out_proj(_attend(q, k_BKSE, v_BKSE, view.mask))
