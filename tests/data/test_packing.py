"""Rows of examples with common beginnings, and what their tokens see."""

from __future__ import annotations

import numpy as np

from mlx_afm.data import Tokens
from mlx_afm.data.batches import key_indices, pack


def tokens(ids: str, weights: str | None = None) -> Tokens:
    """One id per letter; trained where `weights` says so, by default everywhere."""
    numbers = np.array([ord(letter) - ord("a") for letter in ids], np.int32)
    return Tokens(numbers, np.array([float(digit) for digit in weights or "1" * len(ids)], np.float32), ids)


def letters(ids) -> str:
    return "".join(chr(ord("a") + number) for number in ids)


def test_the_example_of_the_docstring():
    row = pack([tokens("abx"), tokens("abcy")])
    assert letters(row.ids_L[:3]) == "abc"
    assert len(row.ids_L) == 32
    assert row.positions_L[:4].tolist() == [0, 1, 2, 0]
    assert row.subtree_end_L[:5].tolist() == [2, 2, 2, 3, 4]
    assert row.output_positions_T.tolist() == [0, 1, 1, 2]
    assert letters(row.targets_T) == "bcxy"
    assert row.weights_T.tolist() == [2, 1, 1, 1]


def test_branches_end_where_the_next_one_begins():
    row = pack([tokens("abdx", "0001"), tokens("aeax", "0001"), tokens("abcx", "0001"), tokens("ffx", "001")])
    assert letters(row.ids_L[:8]) == "abcdeaff"
    assert row.positions_L[:8].tolist() == [0, 1, 2, 2, 1, 2, 0, 1]
    assert row.subtree_end_L[:8].tolist() == [5, 3, 2, 3, 5, 5, 7, 7]
    assert row.output_positions_T.tolist() == [2, 3, 5, 7]


def test_reach_is_the_mask_and_no_more():
    """Against a loop over pairs; every size of group must say the same."""
    rng = np.random.default_rng(0)
    rows = [
        Tokens(rng.integers(0, 3, rng.integers(2, 12)).astype(np.int32), np.ones(1, np.float32), "x") for _ in range(40)
    ]
    rows = [Tokens(row.ids, np.ones(len(row), np.float32), "x") for row in rows]
    row = pack(rows)
    for queries in (np.arange(len(row.ids_L), dtype=np.int32), row.output_positions_T):
        keys, mask = key_indices(queries, row.subtree_end_L)
        groups, size, _ = mask.shape
        assert groups * size == len(queries)
        for place, query in enumerate(queries):
            group, inside = divmod(place, size)
            seen = sorted(keys[group][mask[group, inside]].tolist())
            assert seen == [key for key in range(len(row.ids_L)) if key <= query <= row.subtree_end_L[key]]
        assert keys.shape[1] % 16 == 0


def test_groups_are_small_where_examples_share_little():
    rng = np.random.default_rng(1)
    rows = [Tokens(rng.integers(0, 9999, 65).astype(np.int32), np.ones(65, np.float32), "x") for _ in range(16)]
    row = pack(rows)
    keys, mask = key_indices(np.arange(len(row.ids_L), dtype=np.int32), row.subtree_end_L)
    assert keys.size + mask.size < len(row.ids_L) ** 2 / 8
