"""Who may see whom: rotary tables and masks of all tokens of a call, and of those that are read.

Shape suffixes: B batch, L tokens, N tokens that are read, S keys, K key heads, E head width, G groups of
consecutive queries that share their keys, Q queries of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_afm.model.config import AFMConfig
from mlx_afm.model.layers import rotary_tables

Mask = mx.array | str | None


@dataclass(frozen=True)
class KeyIndices:
    """Which keys each group of consecutive queries attends to, when no query sees more than a few.

    Attributes:
        keys_GS: int32, indices into the B * L tokens of the call.
        mask_GQS: bool, which of its group's keys a query sees.

    Example: of a row `a b | c d` of two documents, in groups of 2: keys `0 1; 2 3`, and the lower
    triangle for a mask, twice. Attention then takes half the work of a mask over the whole row.
    """

    keys_GS: mx.array
    mask_GQS: mx.array


@dataclass(frozen=True)
class Packing:
    """Where the tokens of packed rows stand and what they see; whoever lays out the rows knows it.

    Attributes:
        positions_BL: int32, place of each token in its example.
        everyone: what each token sees.
        output_positions: what each token that is read sees, in the order of `output_positions`.
    """

    positions_BL: mx.array
    everyone: KeyIndices
    output_positions: KeyIndices


@dataclass(frozen=True)
class AttentionContext:
    """Queries at some positions: how to rotate them and what they see.

    Attributes:
        cos, sin: rotary tables, (B or 1, L, 1, P, 2), see `layers.rotary_tables`.
        mask: None (all keys), "causal", or bool (B or 1, 1, L, S); with `keys_GS` bool (G, 1, Q, S).
        keys_GS: the keys of each group of queries, see `KeyIndices`; None for all of the row's.
        output_positions: what the tokens at output positions see, if it was given.
    """

    cos: mx.array
    sin: mx.array
    mask: Mask
    keys_GS: mx.array | None = None
    output_positions: KeyIndices | None = None

    def of(self, x_BKSE: mx.array) -> mx.array:
        """Those keys or values that are seen: (B, K, S, E), or (G, K, S, E)."""
        if self.keys_GS is None:
            return x_BKSE
        _, heads, _, width = x_BKSE.shape
        flat = x_BKSE.transpose(1, 0, 2, 3).reshape(heads, -1, width)
        return flat[:, self.keys_GS].transpose(1, 0, 2, 3)

    def at(self, output_positions_BN: mx.array, length: int, keys: int) -> AttentionContext:
        """The context of the tokens at indices `output_positions_BN` only; `keys` is how many keys there are."""
        cos, sin = take_rows(self.cos, output_positions_BN), take_rows(self.sin, output_positions_BN)
        if self.output_positions is not None:
            return AttentionContext(cos, sin, self.output_positions.mask_GQS[:, None], self.output_positions.keys_GS)
        return AttentionContext(cos, sin, _mask_rows(self.mask, output_positions_BN, length, keys))


def visible_mask(
    positions_BL: mx.array, documents_BL: mx.array | None = None, subtree_end_BL: mx.array | None = None
) -> mx.array:
    """Bool (B, 1, L, L): token j is visible to i iff i reads j's document and position j <= position i.

    A document is read by itself, and by all documents up to `subtree_end_BL` if that is given: with documents
    numbered in preorder of a tree of prefixes, these are the prefix's continuations.
    """
    visible = positions_BL[:, None, :, None] >= positions_BL[:, None, None, :]
    if documents_BL is None:
        return visible
    readers, read = documents_BL[:, None, :, None], documents_BL[:, None, None, :]
    if subtree_end_BL is None:
        return visible & (readers == read)
    return visible & (readers >= read) & (readers <= subtree_end_BL[:, None, None, :])


def positions_in_documents(documents_BL: mx.array) -> mx.array:
    """Position of each token within its document, counted from 0 also if the document is interrupted."""
    same = documents_BL[:, :, None] == documents_BL[:, None, :]
    earlier = mx.tril(mx.ones(same.shape[1:], dtype=mx.bool_), k=-1)
    return mx.sum(same & earlier, axis=-1).astype(mx.int32)


def full_context(
    config: AFMConfig,
    dtype: mx.Dtype,
    length: int,
    *,
    positions_BL: mx.array | None,
    documents_BL: mx.array | None,
    subtree_end_BL: mx.array | None,
    cache: Any,
) -> AttentionContext:
    """The context of all tokens of a call.

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
        mask = visible_mask(positions_BL, documents_BL, subtree_end_BL)
    return AttentionContext(*rotary_tables(positions_BL, config, dtype), mask)


def packed_context(config: AFMConfig, dtype: mx.Dtype, packing: Packing) -> AttentionContext:
    """The context of all tokens of packed rows."""
    everyone = packing.everyone
    tables = rotary_tables(packing.positions_BL, config, dtype)
    return AttentionContext(*tables, everyone.mask_GQS[:, None], everyone.keys_GS, packing.output_positions)


def take_rows(array: mx.array, output_positions_BN: mx.array) -> mx.array:
    """Rows `output_positions_BN` of axis 1, (B or 1, L, ...) to (B, N, ...)."""
    if array.shape[0] != output_positions_BN.shape[0]:
        array = mx.broadcast_to(array, (output_positions_BN.shape[0], *array.shape[1:]))
    index = output_positions_BN.reshape(*output_positions_BN.shape, *(1,) * (array.ndim - 2))
    return mx.take_along_axis(array, index, axis=1)


def _mask_rows(mask: Mask, output_positions_BN: mx.array, length: int, keys: int) -> Mask:
    if mask is None:
        return None
    if isinstance(mask, str):
        columns = mx.arange(keys) - (keys - length)  # index within this call; negative for cached keys
        return columns <= output_positions_BN[:, None, :, None]
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mx.expand_dims(take_rows(mx.squeeze(mask, 1), output_positions_BN), 1)
