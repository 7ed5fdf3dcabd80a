"""Data in numbers, counted again from the tokens themselves."""

import json
from itertools import pairwise

import numpy as np
import pytest

from conversations import CONVERSATIONS
from mlx_afm.data import DataConfig, plan_batches, read_tokens
from mlx_afm.data.stats import Place, histogram, measure_split
from mlx_afm.errors import DataError


def talk(count, *, system=None, words=3):
    head = [{"role": "system", "content": system}] if system else []
    return [
        [*head, {"role": "user", "content": "word " * (1 + i * words % 41)}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(count)
    ]


def test_counts_are_those_of_the_tokens(write, tokenizer, tokenizer_file):
    records = [{"messages": messages, "tools": tools} for messages, tools, text in CONVERSATIONS.values() if not text]
    files = (write("a.jsonl", *records), write("b.jsonl", *talk(30), {"text": "plain words"}))
    stats, table = measure_split(files, tokenizer_file), read_tokens(files, tokenizer_file)
    lengths = table.lengths
    assert (stats.examples, stats.faulty_lines) == (len(table), 0)
    assert (stats.tokens, stats.trained_tokens) == (len(table.ids), table.trained.sum())
    assert (stats.mean, stats.longest) == (lengths.mean(), lengths.max())
    ordered = sorted(lengths.tolist())
    assert stats.median == ordered[(len(ordered) - 1) // 2]
    assert sum(length <= stats.percentile_95 for length in ordered) >= 0.95 * len(ordered)
    assert sum(length < stats.percentile_95 for length in ordered) < 0.95 * len(ordered)
    # Every token is of some turn but the end-of-sequence token in front; plain text is all its own.
    assert sum(stats.role_tokens.values()) == stats.tokens - (len(table) - 1)
    assert stats.role_tokens["text"] == len(table[-1])
    for bar in stats.histogram:
        assert bar.examples == sum(bar.low <= length < bar.high for length in ordered)
    assert sum(bar.examples for bar in stats.histogram) == len(table)


def test_roles_literally(write, tokenizer, tokenizer_file):
    messages = CONVERSATIONS["tools"][0]
    stats = measure_split((write("a.jsonl", {"messages": messages}),), tokenizer_file)
    ids = read_tokens((write("a.jsonl", {"messages": messages}),), tokenizer_file)[0].ids.tolist()
    starts = [*(place for place, token in enumerate(ids) if token == tokenizer.turn_start_id), len(ids)]
    turns = [stop - start for start, stop in pairwise(starts)]
    system, user, call, result, answer = turns
    expected = {"system": system, "user": user, "assistant": call + answer, "tool": result, "text": 0}
    assert stats.role_tokens == expected
    assert (stats.system_mean, stats.system_longest) == (system, system)


def test_what_packing_saves(write, tokenizer_file):
    files = (write("a.jsonl", *talk(21, system="one"), *talk(13, system="the other one"), *talk(9)),)
    stats, table = measure_split(files, tokenizer_file, DataConfig(system=None)), read_tokens(
        files, tokenizer_file, DataConfig(system=None)
    )  # fmt: skip
    ids = [tokens.ids.tolist() for tokens in table]
    padded = shared = 0
    for batch in plan_batches(table.lengths.tolist(), 4, seed=0, epoch=0):
        padded += len(batch) * max(len(ids[index]) for index in batch)
        heads = set()
        for index in batch:
            stop = ids[index].index(4) + 1 if index < 34 else 0  # the first <turn_end>: of the system turn
            head = tuple(ids[index][:stop])
            shared += len(ids[index]) - (len(head) if head in heads else 0)
            heads.add(head)
    assert (stats.padded_tokens, stats.shared_tokens) == (padded, shared)
    assert stats.shared_tokens < stats.tokens < stats.padded_tokens
    values = stats.to_dict()
    assert values["packed_saves"] == pytest.approx(1 - stats.tokens / padded)
    assert values["sharing_saves"] == pytest.approx(1 - shared / padded)
    json.dumps(values)


def test_lengths_are_whole_whatever_truncation_says(write, tokenizer_file):
    files = (write("a.jsonl", *talk(20)),)
    whole = measure_split(files, tokenizer_file)
    for truncation in ("error", "drop", "truncate-prompt", "truncate-answer"):
        stats = measure_split(files, tokenizer_file, DataConfig(max_tokens=60, truncation=truncation))
        assert (stats.tokens, stats.examples, stats.limit) == (whole.tokens, 20, 60)
        assert stats.longer == sum(length > 60 for length in read_tokens(files, tokenizer_file).lengths)
        assert stats.longer > 0


def test_the_longest_are_named(write, tokenizer_file):
    files = (write("a.jsonl", *talk(20, words=2)), write("b.jsonl", "\n", *talk(3, words=19)))
    stats, table = measure_split(files, tokenizer_file), read_tokens(files, tokenizer_file)
    order = np.argsort(-table.lengths, kind="stable")[:5].tolist()
    places = [(str(files[table.places[i][0]]), int(table.places[i][1]), int(table.lengths[i])) for i in order]
    assert stats.longest_examples == tuple(Place(*place) for place in places)


def test_faulty_lines_are_counted_and_left_out(write, tokenizer_file):
    good = talk(3)
    files = (write("a.jsonl", good[0], "{\n", *good[1:], [{"role": "user"}, {"role": "x", "content": ""}]),)
    stats = measure_split(files, tokenizer_file)
    assert (stats.examples, stats.faulty_lines) == (3, 2)
    with pytest.raises(DataError, match=r"a.jsonl: no examples .found 1 faulty line"):
        measure_split((write("a.jsonl", "{"),), tokenizer_file)
    with pytest.raises(DataError, match=r"no examples .found no records"):
        measure_split((write("a.jsonl", "\n"),), tokenizer_file)


@pytest.mark.parametrize(
    ("longest", "width", "bins"), [(5, 1, 6), (15, 1, 16), (16, 2, 9), (308, 20, 16), (4000, 500, 9)]
)
def test_a_histogram_has_round_bins(longest, width, bins):
    found = histogram(np.array([1, longest]))
    assert [bar.low for bar in found] == list(range(0, bins * width, width))
    assert all(bar.high - bar.low == width for bar in found)
    assert found[-1].examples >= 1


def test_progress_reaches_its_end(write, tokenizer_file):
    told = []
    path = write("a.jsonl", *talk(20))
    measure_split((path,), tokenizer_file, on_progress=lambda *where: told.append(where))
    assert told[-1] == (path.stat().st_size,) * 2
