"""The number of proposals that adapts: what pays is proposed, and no row falls behind plain decoding."""

from __future__ import annotations

import random

import pytest

from mlx_afm.generation.draft_length import LENGTHS, DraftLength

PLAIN = 1.0


class Row:
    """A row of a batch, whose proposals are accepted with some chance, which may change in its answer."""

    def __init__(self, chance):
        self.chance, self.tokens = chance, 0
        self.seconds = 0.0

    def accepted(self, length, rng):
        chance = self.chance(self.tokens) if callable(self.chance) else self.chance
        return next((count for count in range(length) if rng.random() >= chance), length)


class Simulated:
    """Rounds that take known times: a draft's step, and a pass of the target that is longer with more tokens."""

    def __init__(self, rows, *, draft, judged=0.05, noise=0.0, catch_up=0.02, seed=0):
        self.now, self.rng = 0.0, random.Random(seed)
        self.rows, self.draft, self.judged, self.noise, self.catch_up = rows, draft, judged, noise, catch_up
        self.lengths = DraftLength(0.2, clock=lambda: self.now)
        self.planned, self.behind = [], 0

    def seconds(self, length):
        if length == 0:
            return PLAIN
        return PLAIN + length * (self.draft + self.judged) + self.behind * self.catch_up

    def step(self, *, between=0.0):
        """One step; returns its number of proposals."""
        self.lengths.finish()
        length = self.lengths.plan(self.rows, self.behind)
        self.lengths.start(self.rows, length, missing=self.behind if length else 0)
        taken = self.seconds(length) * (1 + self.noise * self.rng.random())
        self.now += taken + between
        accepted = [row.accepted(length, self.rng) for row in self.rows]
        if length:
            self.lengths.add(self.rows, [length] * len(self.rows), accepted)
        self.behind = 0 if length else self.behind + 1
        for row, count in zip(self.rows, accepted):
            row.tokens, row.seconds = row.tokens + 1 + count, row.seconds + taken
        self.planned.append(length)
        return length

    def run(self, tokens):
        while min(row.tokens for row in self.rows) < tokens:
            self.step()
        return self


@pytest.mark.parametrize("draft", [0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("catch_up", [0.02, 0.1])
def test_a_row_is_never_slower_than_plain_decoding_by_more_than_five_percent(draft, chance, noise, catch_up):
    row = Row(chance)
    run = Simulated([row], draft=draft, noise=noise, catch_up=catch_up).run(1000)
    plain = PLAIN * (1 + noise / 2)
    assert row.seconds <= 1.05 * plain * row.tokens
    best = min(run.seconds(length) / sum(chance**count for count in range(length + 1)) for length in (0, *LENGTHS)) * (
        1 + noise / 2
    )  # as if it were known from the start
    assert row.seconds <= 1.15 * best * row.tokens


@pytest.mark.parametrize("seed", range(5))
def test_no_row_of_a_batch_is_slower_however_good_its_neighbours_are(seed):
    rows = [Row(chance) for chance in (1.0, 0.0, 0.9, 0.5)]
    Simulated(rows, draft=0.2, noise=0.3, seed=seed).run(1000)
    for row in rows:
        assert row.seconds <= 1.05 * 1.15 * PLAIN * row.tokens


def test_rows_that_all_accept_something_share_long_rounds():
    rows = [Row(chance) for chance in (0.9, 0.7, 0.8)]
    Simulated(rows, draft=0.03).run(1000)
    assert all(row.seconds < 0.75 * PLAIN * row.tokens for row in rows)


def test_a_draft_that_becomes_good_is_noticed_and_one_that_becomes_bad_too():
    row = Row(lambda place: 0.95 if 500 <= place < 1500 else 0.0)
    run = Simulated([row], draft=0.05)
    spent = {}
    while row.tokens < 2500:
        before = row.seconds
        part = 0 if row.tokens < 500 else 2 if row.tokens >= 1600 else 1
        run.step()
        spent[part] = spent.get(part, 0) + row.seconds - before
    assert spent[0] < 1.05 * 500
    assert spent[1] < 0.6 * 1000
    assert spent[2] < 1.05 * 1000


def test_what_is_proposed_to_a_draft_that_is_always_right_and_to_one_that_never_is():
    good, bad = (Simulated([Row(chance)], draft=0.03).run(1000).planned for chance in (1.0, 0.0))
    assert max(set(good), key=good.count) == max(LENGTHS)
    assert bad.count(0) > 0.97 * len(bad)
    assert 0 < sum(map(bool, bad[200:])) < 20  # it is tried now and then


def test_a_pause_between_two_steps_of_a_caller_is_not_taken_for_a_slow_draft():
    row = Row(1.0)
    run = Simulated([row], draft=0.03)
    for _ in range(200):
        run.step(between=0.5)
    assert row.tokens > 1500


def test_nothing_is_learnt_of_a_time_that_is_not_to_be_taken():
    run = Simulated([Row(1.0)], draft=0.03).run(300)
    length = run.planned[-1]
    run.now += 1000
    run.lengths.abandon()
    assert [run.step() for _ in range(4)] == [length] * 4
