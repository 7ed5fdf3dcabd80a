"""Near prompts, against the share of shingles counted pair by pair."""

import random
from itertools import combinations

import numpy as np
import pytest

from mlx_afm.data.near_duplicates import THRESHOLD, group_near, normalise

WORDS = ["lamp", "river", "stone", "cloud", "paper", "window", "garden", "silver"]
WORDS += ["table", "music", "winter", "letter", "bridge", "candle", "forest", "mirror"]


def shingles(prompt):
    words = prompt.split(" ")
    return set(zip(["<start>", *words], words))


def share(one, other):
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def prompts(count, *, seed=0):
    """Some sentences, and for each some with a word or two changed; all different."""
    rng = random.Random(seed)
    made = {}
    while len(made) < count:
        sentence = [rng.choice(WORDS) for _ in range(rng.randint(3, 20))]
        for changes in (0, 1, 1, 2):
            words = list(sentence)
            for _ in range(changes):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
            made[" ".join(words)] = None
    return list(made)[:count]


def test_normalise():
    assert normalise("  Sort  file_2.txt (in REVERSE)!") == "sort file txt in reverse"
    assert normalise("Größe: 12,5 m") == normalise("GRÖSSE 3 m") == "grösse m"
    assert normalise("東京は大きい") == "東 京 は 大 き い"
    assert normalise("1 + 1 =  2?") == "1 + 1 = 2?"
    assert normalise("") == ""


def test_pairs_are_found_by_what_they_share():
    found, near = 0, 0
    made = prompts(400)
    groups = group_near(made)
    for (i, one), (j, other) in combinations(enumerate(made), 2):
        exact = share(one, other)
        if exact >= THRESHOLD + 0.1:
            near += 1
            found += groups[i] == groups[j]
    assert near > 100
    assert found == near


def test_nothing_else_is_grouped():
    made = prompts(400)
    groups = group_near(made)
    for group in set(groups.tolist()):
        members = [made[index] for index in np.flatnonzero(groups == group)]
        for one in members if len(members) > 1 else ():
            # Four standard deviations of the estimate below the threshold.
            assert max(share(one, other) for other in members if other != one) > THRESHOLD - 0.17


def test_the_threshold_moves_the_border():
    made = prompts(400)
    counts = [len(set(group_near(made, threshold).tolist())) for threshold in (0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2] < counts[3] == len(made)


def test_groups_are_named_by_their_first_and_do_not_change():
    made = prompts(300, seed=5)
    groups = group_near(made)
    assert all(groups[group] == group <= index for index, group in enumerate(groups.tolist()))
    assert (group_near(made) == groups).all()
    shuffled = random.Random(1).sample(range(300), 300)
    other = group_near([made[index] for index in shuffled])
    same = {frozenset(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist())}
    again = {frozenset(shuffled[i] for i in np.flatnonzero(other == group)) for group in set(other.tolist())}
    assert len(same & again) > 0.97 * len(same)  # pairs at the border depend on who is compared with whom


def test_nearness_is_passed_on():
    words = WORDS[:12]
    steps = [" ".join([*words[: 12 - count], *(f"new{'x' * i}" for i in range(count))]) for count in range(6)]
    assert share(steps[0], steps[5]) < THRESHOLD - 0.1
    assert len(set(group_near(steps).tolist())) == 1


@pytest.mark.parametrize("made", [[], ["one"], ["one", "two"], ["", "one"]])
def test_few_prompts(made):
    assert group_near(made).tolist() == list(range(len(made)))
