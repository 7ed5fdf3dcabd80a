"""Splitting: whole groups, the asked sizes, the same again, the bytes as they were."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest

from mlx_afm.data import DataConfig
from mlx_afm.data.split import SplitConfig, assign, group_examples, split_data
from mlx_afm.errors import ConfigError, DataError

SIDES = ("train", "valid", "test")


def chat(prompt, answer="a"):
    system = {"role": "system", "content": "The same long system prompt stands in front of every conversation here."}
    return [system, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


NOUNS = ["lamp", "river", "stone", "cloud", "paper", "window", "garden", "silver"]
NOUNS += ["table", "music", "winter", "letter", "bridge", "candle", "forest"]


def planted(count, *, seed=0):
    """Prompts of random words; every tenth has four near ones elsewhere: (prompts, family of each or -1)."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        words = [f"{rng.choice(NOUNS)}{rng.choice(NOUNS)}" for _ in range(14)]
        family = number if number % 10 == 0 else -1
        made.append((" ".join(words), family))
        if family >= 0:
            changed = [*words]
            changed[rng.randrange(14)] = "else"
            made.append((" ".join(words).upper() + "!", family))
            made.append((", ".join(words) + " 12", family))
            made.append((" ".join(changed), family))
            made.append((" ".join([*words, "please"]), family))
    rng.shuffle(made)
    return [prompt for prompt, _ in made], [family for _, family in made]


def sides_of(folder):
    """Line -> side."""
    found = {}
    for side in SIDES:
        for line in (folder / f"{side}.jsonl").read_bytes().splitlines():
            found[line] = side
    return found


def test_planted_near_duplicates_end_up_together(write, tmp_path):
    prompts, families = planted(500)
    lines = [json.dumps(chat(prompt, str(index))) + "\n" for index, prompt in enumerate(prompts)]
    split = split_data((write("all.jsonl", *lines),), tmp_path / "out", SplitConfig(valid=0.2, test=0.2))
    sides = sides_of(tmp_path / "out")
    assert len(sides) == len(prompts) == 700
    where = {}
    for line, family in zip(lines, families, strict=True):
        if family >= 0:
            where.setdefault(family, set()).add(sides[line.strip().encode()])
    assert len(where) == 50
    assert all(len(found) == 1 for found in where.values())
    assert {side for found in where.values() for side in found} == set(SIDES)
    assert (split.groups, split.largest_group) == (500, 5)
    assert split.examples == {"train": 420, "valid": 140, "test": 140}


def test_no_group_is_on_two_sides_and_sizes_are_as_asked():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), rng.integers(1, 30, 300))
    rng.shuffle(groups)
    for seed in range(20):
        config = SplitConfig(valid=0.1, test=0.03, seed=seed)
        sides = assign(groups, config, where="x")
        assert all(len(set(sides[groups == group].tolist())) == 1 for group in range(300))
        sizes = np.bincount(sides)
        for side, share in ((1, 0.1), (2, 0.03)):
            asked = round(share * len(groups))
            assert asked - 30 < sizes[side] <= asked


def test_single_examples_give_the_exact_sizes():
    for count, expected in ((1000, (50, 50)), (999, (50, 50)), (41, (2, 2)), (7, (1, 1)), (3, (1, 1))):
        sides = assign(np.arange(count), SplitConfig(), where="x")
        assert tuple(np.bincount(sides)[1:]) == expected


def test_the_same_seed_gives_the_same_split(write, tmp_path):
    source = write("all.jsonl", *(chat(prompt) for prompt in planted(100)[0]))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_data((source,), tmp_path / name, SplitConfig(seed=seed, valid=0.2))
        found.append({side: (tmp_path / name / f"{side}.jsonl").read_bytes() for side in SIDES})
    assert found[0] == found[1]
    assert all(found[0][side] != found[2][side] for side in SIDES)


def test_lines_keep_their_bytes_and_their_order(write, tmp_path):
    rng = random.Random(3)
    records = [chat(" ".join(rng.choices(NOUNS, k=9)), "ä" * (index + 1)) for index in range(60)]
    lines = [
        json.dumps(record, ensure_ascii=index % 2 == 0) + " " * (index % 3) for index, record in enumerate(records)
    ]
    text = "\n".join([*lines[:30], "", *lines[30:]]).replace(", ", " , ")
    source = write("all.jsonl", text.replace("\n", "\r\n"))
    split_data((source,), tmp_path / "out", SplitConfig(valid=0.3, test=0))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.jsonl", "valid.jsonl"]
    parts = [(tmp_path / "out" / f"{side}.jsonl").read_bytes().split(b"\n")[:-1] for side in ("train", "valid")]
    whole = [line.encode() for line in text.split("\n") if line]
    assert [line for line in whole if line in set(parts[0])] == parts[0]
    assert Counter(whole) == Counter(parts[0]) + Counter(parts[1])
    assert len(parts[1]) == 18


def test_other_forms_become_json_lines(write, tmp_path):
    rows = "".join(f'"{noun} {noun}","{number}"\n' for number, noun in enumerate(NOUNS))
    source = write("all.csv", "question,answer\n" + rows)
    data_config = DataConfig(fields=(("prompt", "question"), ("completion", "answer")))
    split_data((source,), tmp_path / "out", SplitConfig(valid=0.2, test=0.2), data_config)
    records = [json.loads(line) for line in sides_of(tmp_path / "out")]
    assert sorted(records, key=lambda r: int(r["answer"])) == [
        {"question": f"{noun} {noun}", "answer": str(number)} for number, noun in enumerate(NOUNS)
    ]


def test_prompts_are_what_is_grouped_not_answers_nor_system_messages():
    assert group_examples(["a b", "A  b!", "c d", "a b 3"]).tolist() == [0, 0, 1, 0]
    numbers = group_examples(["sort the list of names", "sort this list of names", "draw me a sheep"], threshold=1)
    assert numbers.tolist() == [0, 1, 2]


def test_conversations_are_grouped_by_all_that_is_asked(write, tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    lines = [[*turns, *chat(f"{one} {other} {one}")[1:]] for one in NOUNS for other in NOUNS]
    split = split_data((write("all.jsonl", *lines),), tmp_path / "out", SplitConfig(threshold=1.0))
    assert split.groups == len(NOUNS) ** 2


def test_what_cannot_be_split(write, tmp_path):
    source = write("all.jsonl", *[chat("same prompt", str(i)) for i in range(20)])
    with pytest.raises(DataError, match="too few groups: valid would be empty"):
        split_data((source,), tmp_path / "out")
    faulty = write("bad.jsonl", chat("one two"), "{\n", chat("three four"), [{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match=r"2 faulty line\(s\). Nothing was written") as error:
        split_data((faulty,), tmp_path / "out")
    assert "bad.jsonl line 2, column 2: not JSON" in str(error.value)
    assert "bad.jsonl line 4: " in str(error.value)
    with pytest.raises(DataError, match="no examples"):
        split_data((write("empty.jsonl", "\n"),), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="would replace its source"):
        split_data((write("train.jsonl", chat("x")),), tmp_path)


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as error:
        SplitConfig(valid=1.0, test=-0.1, threshold=0, seed=-1)
    assert len(error.value.details) == 4
    with pytest.raises(ConfigError, match="valid and test together: expected between 0 and 1, found 1"):
        SplitConfig(valid=0.5, test=0.5)
    with pytest.raises(ConfigError, match="valid and test together"):
        SplitConfig(valid=0, test=0)


@pytest.mark.slow
def test_a_real_data_set_in_time(tldr_train, tmp_path):
    started = time.process_time()
    split = split_data((tldr_train,), tmp_path / "out")
    assert time.process_time() - started < 20
    assert split.examples == {"train": 25854, "valid": 1436, "test": 1436}
    lines = tldr_train.read_bytes().splitlines()
    assert Counter(lines) == Counter(
        line for side in SIDES for line in (tmp_path / "out" / f"{side}.jsonl").read_bytes().splitlines()
    )
