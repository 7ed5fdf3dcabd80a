"""Lines to examples to tokens to batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_afm.data import Tokens, encode_examples, make_batch, parse_line, plan_batches, plan_in_order, read_examples
from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.demo import ASSETS

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SPECIAL = ("<turn_end>",)


@pytest.fixture(scope="module")
def tokenizer():
    return AFMTokenizer.from_file(ASSETS / "tokenizer.model")


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("line", [[USER, ANSWER], {"messages": [USER, ANSWER]}, {"anything": [USER, ANSWER]}])
def test_both_forms_of_a_line(line):
    example = parse_line(json.dumps(line), SPECIAL, where="f line 1")
    assert [(message.role, message.content) for message in example.messages] == [("user", "hi"), ("assistant", "ho")]
    assert example.where == "f line 1"


def test_tools_of_a_line_reach_the_system_turn(tokenizer):
    line = json.dumps({"messages": [USER, ANSWER], "tools": [{"name": "look"}]})
    tools = parse_line(line, SPECIAL, where="f line 1")
    (tokens,) = encode_examples([tools], tokenizer)
    text = tokenizer.decode(tokens.ids.tolist())
    assert 'system tools: {"name": "look"}<turn_end>' in text


def test_every_faulty_line_is_named_in_one_error(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        [USER, ANSWER],
        "{broken\n",
        "\n",
        [ANSWER, USER],
        [USER, {"role": "assistant", "content": "a<turn_end>b"}],
        {"messages": "none"},
        [USER, {"role": "assistant", "content": ""}],
        42,
    )
    with pytest.raises(DataError) as error:
        read_examples(path, SPECIAL)
    message = str(error.value)
    assert "6 faulty line(s)" in message
    for number in (2, 4, 5, 6, 7, 8):
        assert f"train.jsonl line {number}" in message
    assert "column 2" in message
    assert "line 1:" not in message
    assert "line 3" not in message


def test_files_that_are_none(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        read_examples(tmp_path / "train.jsonl", SPECIAL)
    with pytest.raises(DataError, match="no examples"):
        read_examples(write(tmp_path / "empty.jsonl", "\n"), SPECIAL)
    (tmp_path / "latin.jsonl").write_bytes(b"\n[\xe9]\n")
    with pytest.raises(FormatError, match="line 2, byte 2: not UTF-8"):
        read_examples(tmp_path / "latin.jsonl", SPECIAL)
    deep = write(tmp_path / "deep.jsonl", "[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match="line 1"):
        read_examples(deep, SPECIAL)


def test_every_assistant_turn_is_trained_with_its_end(tokenizer):
    line = json.dumps([USER, ANSWER, USER, {"role": "assistant", "content": "ls"}])
    (tokens,) = encode_examples([parse_line(line, SPECIAL, where="x")], tokenizer)
    trained = tokens.ids[tokens.weights > 0].tolist()
    assert trained.count(tokenizer.turn_end_id) == 2
    assert tokenizer.decode(trained) == "ho<turn_end>ls<turn_end>"
    assert tokens.weights[0] == 0
    assert tokens.trained_tokens == len(trained)


def test_too_long_examples_are_refused_with_their_lengths(tokenizer):
    line = json.dumps([USER, {"role": "assistant", "content": "word " * 40}])
    example = parse_line(line, SPECIAL, where="train.jsonl line 7")
    with pytest.raises(DataError, match=r"1 example\(s\) longer than 50 tokens.*\n.*line 7: \d+ tokens"):
        encode_examples([example], tokenizer, max_tokens=50)


def tokens_of(*weights: float) -> Tokens:
    return Tokens(np.arange(10, 10 + len(weights), dtype=np.int32), np.array(weights, np.float32), "x")


def test_a_batch_shifts_by_one_and_keeps_what_is_needed():
    batch = make_batch([tokens_of(0, 0, 1, 1), tokens_of(0, 0.5, 0, 0, 0, 1), tokens_of(1, 0)])
    assert batch.inputs_BL.tolist() == [[10, 11, 12, 0, 0], [10, 11, 12, 13, 14], [10, 0, 0, 0, 0]]
    assert batch.needed_BN.tolist() == [[1, 2], [0, 4], [0, 0]]
    assert batch.targets_BN.tolist() == [[12, 13], [11, 15], [0, 0]]
    # The first token is nobody's target, whatever its weight.
    assert batch.weights_BN.tolist() == [[1, 1], [0.5, 1], [0, 0]]
    assert batch.read_tokens == 3 + 5 + 1


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_a_plan_holds_every_example_once_and_depends_on_seed_and_epoch(count):
    lengths = np.random.default_rng(1).integers(5, 400, count).tolist()
    plan = plan_batches(lengths, 4, seed=3, epoch=2)
    assert sorted(index for batch in plan for index in batch) == list(range(count))
    assert plan == plan_batches(lengths, 4, seed=3, epoch=2)
    assert sum(len(batch) < 4 for batch in plan) <= 1 + count // 128
    if count > 7:
        assert plan != plan_batches(lengths, 4, seed=3, epoch=3)
        assert plan != plan_batches(lengths, 4, seed=4, epoch=2)


def test_a_plan_wastes_little_on_padding():
    lengths = np.random.default_rng(1).integers(5, 400, 1000).tolist()

    def padded(plan):
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in plan)

    assert padded(plan_batches(lengths, 8, seed=0, epoch=0)) < 1.1 * sum(lengths)
    assert padded(plan_in_order(1000, 8)) > 1.5 * sum(lengths)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch size below 1"):
        plan_batches([1, 2], 0, seed=0, epoch=0)
