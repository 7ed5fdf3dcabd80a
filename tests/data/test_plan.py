"""Plans of an epoch: every example once, rows nearly full, the same for the same seed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_afm.data import Tokens, find_prefixes, plan_packed, require_fitting
from mlx_afm.data.batches import pack
from mlx_afm.errors import ConfigError, DataError


def random_examples(count: int, seed: int = 0, prompts: int = 3) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, 500, rng.integers(5, 40)) for _ in range(prompts)]
    found = []
    for _ in range(count):
        ids = np.concatenate([beginnings[rng.integers(prompts)], rng.integers(0, 500, rng.integers(5, 120))])
        found.append(Tokens(ids.astype(np.int32), np.ones(len(ids), np.float32), "x"))
    return found


def common(first, second) -> int:
    count = 0
    for a, b in zip(first[:-1].tolist(), second[:-1].tolist()):
        if a != b:
            return count
        count += 1
    return count


def distinct_beginnings(rows) -> int:
    """Nodes of the tree of prefixes, counted by listing them."""
    return len({tuple(row.ids[:end].tolist()) for row in rows for end in range(1, len(row))})


def test_prefixes_of_any_two_examples():
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 2, rng.integers(1, 12)).astype(np.int32) for _ in range(60)]
    prefixes = find_prefixes(Tokens(row, np.ones(len(row), np.float32), "x") for row in rows)
    assert prefixes.lengths.tolist() == [len(row) - 1 for row in rows]
    for first in range(60):
        for second in range(60):
            low, high = prefixes.ranks.tolist()[first], prefixes.ranks.tolist()[second]
            if low < high:
                assert prefixes.between(low, high) == common(rows[first], rows[second])


@pytest.mark.parametrize("batch_tokens", [160, 512, 2048])
def test_a_packed_plan_holds_every_example_once_in_rows_that_fit(batch_tokens):
    examples = random_examples(300)
    prefixes = find_prefixes(examples)
    plan = plan_packed(prefixes, batch_tokens, seed=3, epoch=1)
    assert sorted(index for row in plan for index in row) == list(range(300))
    sizes = [distinct_beginnings([examples[index] for index in row]) for row in plan]
    assert max(sizes) <= batch_tokens
    assert all(len(pack([examples[index] for index in row]).ids_L) - size < 32 for row, size in zip(plan, sizes))
    assert plan == plan_packed(prefixes, batch_tokens, seed=3, epoch=1)
    assert plan != plan_packed(prefixes, batch_tokens, seed=3, epoch=2)
    assert plan != plan_packed(prefixes, batch_tokens, seed=4, epoch=1)


def test_rows_are_full_and_hold_examples_of_the_same_prompt():
    examples = random_examples(2000)
    prefixes = find_prefixes(examples)
    plan = plan_packed(prefixes, 1024, seed=0, epoch=0)
    sizes = [distinct_beginnings([examples[index] for index in row]) for row in plan]
    assert sum(sizes) >= 0.98 * (1024 * (len(plan) - 1) + sizes[-1])
    own = sum(prefixes.lengths.tolist()) - sum(20 for _ in examples)
    assert sum(sizes) < 1.15 * own


def test_examples_that_share_nothing_fill_rows_too():
    examples = [Tokens(np.full(26, index + 1, np.int32), np.ones(26, np.float32), "x") for index in range(40)]
    plan = plan_packed(find_prefixes(examples), 100, seed=0, epoch=0)
    assert [len(row) for row in plan] == [4] * 10


def test_of_rows_that_share_as_much_the_tightest_is_taken():
    lengths = (60, 70, 40, 25)  # 60 + 40 and 70 + 25 fit in 100; 40 goes where it leaves nothing
    examples = [Tokens(np.full(n + 1, n, np.int32), np.ones(n + 1, np.float32), "x") for n in lengths]
    plan = plan_packed(find_prefixes(examples), 100, seed=0, epoch=0)
    assert sorted(sorted(row) for row in plan) == [[0, 2], [1, 3]]


def test_one_example_and_none():
    one = [Tokens(np.array([1, 2, 3], np.int32), np.ones(3, np.float32), "x")]
    assert plan_packed(find_prefixes(one), 2, seed=0, epoch=0) == [(0,)]
    assert plan_packed(find_prefixes([]), 2, seed=0, epoch=0) == []


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"longer than a row \(expected at most 50, found"):
        plan_packed(find_prefixes(random_examples(20)), 50, seed=0, epoch=0)
    with pytest.raises(DataError, match=r"2 example\(s\) longer than a row of 7 .*\n  line 1: 8 tokens\n  line 3: 9"):
        require_fitting([8, 9, 2, 10], lambda index: f"line {index}", 7)
    require_fitting([8, 3], str, 7)


TLDR = Path(os.environ.get("MLX_AFM_TLDR", "shared/data/tldr_train.jsonl"))


@pytest.mark.skipif(not TLDR.is_file(), reason="needs tldr_train.jsonl; set MLX_AFM_TLDR to it")
def test_tldr_fills_rows():
    import json

    from mlx_afm.text.tokenizer import AFMTokenizer
    from mlx_afm.workflows.demo import ASSETS

    tokenizer = AFMTokenizer.from_file(ASSETS / "tokenizer.model")
    examples = []
    with TLDR.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(3000)):
            ids = np.array(tokenizer.apply_chat_template(json.loads(line), add_generation_prompt=False), np.int32)
            examples.append(Tokens(ids, np.ones(len(ids), np.float32), "x"))
    started = time.perf_counter()
    prefixes = find_prefixes(examples)
    for size in (512, 1024, 2048):
        plan = plan_packed(prefixes, size, seed=0, epoch=0)
        sizes = [distinct_beginnings([examples[index] for index in row]) for row in plan]
        assert sum(sizes) >= 0.98 * size * len(plan), size
    assert time.perf_counter() - started < 20
