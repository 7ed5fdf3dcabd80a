"""Examples that are too long: refused, dropped, or cut where the user said."""

import pytest

from mlx_afm.data import DataConfig, read_tokens
from mlx_afm.data.records import Example, encode_example
from mlx_afm.data.truncation import fit
from mlx_afm.errors import DataError
from mlx_afm.text.messages import parse_messages

SYSTEM = {"role": "system", "content": "rules"}
LONG = "".join(f"word{i} " for i in range(60))


@pytest.fixture
def encoded(tokenizer):
    def encode(*texts):
        roles = ("user", "assistant") * len(texts)
        messages = [SYSTEM, *({"role": role, "content": text} for role, text in zip(roles, texts))]
        return encode_example(Example(parse_messages(messages, where="x"), (), "x"), tokenizer)

    return encode


def test_what_fits_is_left_alone(encoded):
    example = encoded("a", "b")
    for truncation in ("error", "drop", "truncate-prompt", "truncate-answer"):
        assert fit(example, len(example.ids), truncation).encoded is example


def test_an_error_says_how_much_of_the_answer_would_be_lost(encoded):
    example = encoded("short", LONG)
    with pytest.raises(DataError) as error:
        fit(example, 100, "error")
    answer = sum(example.trained)
    lost = answer - (100 - (len(example.ids) - answer))
    assert f"found {len(example.ids)} tokens" in str(error.value)
    assert f"would lose {lost} of {answer} trained tokens" in str(error.value)
    assert error.value.kind == "too-long"


def test_dropped_examples_are_gone(encoded):
    example = encoded("short", LONG)
    fitted = fit(example, 100, "drop")
    assert (fitted.encoded, fitted.removed_tokens) == (None, len(example.ids))


def test_the_answers_end_is_cut_as_the_toolkit_does(encoded):
    example = encoded("short", LONG)
    fitted = fit(example, 100, "truncate-answer")
    assert fitted.encoded.ids == example.ids[:100]
    assert fitted.encoded.trained == example.trained[:100]
    assert fitted.removed_tokens == len(example.ids) - 100
    assert fit(encoded(LONG, "ok"), 50, "truncate-answer").encoded is None  # nothing trained would be left


def test_prompts_lose_their_middle_and_nothing_else(encoded, tokenizer):
    example = encoded(LONG, "the answer", "tail", "done")
    limit = len(example.ids) - 40
    kept = fit(example, limit, "truncate-prompt").encoded
    assert len(kept.ids) == limit
    text = tokenizer.decode(kept.ids[1:])
    assert text.startswith("<turn_start> system\nrules<turn_end><turn_start> user\nword0 word1")
    assert text.endswith("<turn_start> assistant\nthe answer<turn_end><turn_start> user\ntail<turn_end>"
                         "<turn_start> assistant\ndone<turn_end>")  # fmt: skip
    assert "word59" in text
    assert sum(kept.trained) == sum(example.trained)


def test_the_longest_prompt_is_cut_first_then_the_next(encoded):
    example = encoded(LONG, "a", LONG[:100], "b")
    bodies = [turn.stop - 1 - turn.body for turn in example.turns if turn.role == "user"]
    limit = len(example.ids) - (bodies[0] - 2) - 10
    kept = fit(example, limit, "truncate-prompt")
    assert len(kept.encoded.ids) == limit
    assert kept.removed_tokens == bodies[0] - 2 + 10


def test_answers_too_long_for_any_prompt_are_refused(encoded):
    with pytest.raises(DataError, match="The system message and answers alone are too long"):
        fit(encoded("short", LONG), 60, "truncate-prompt")


def test_a_table_counts_what_was_lost(write, tokenizer_file):
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    long = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "y"}]
    path = write("train.jsonl", short, long, short)
    whole = read_tokens((path,), tokenizer_file)
    with pytest.raises(DataError, match="line 2: too long"):
        read_tokens((path,), tokenizer_file, DataConfig(max_tokens=100))
    dropped = read_tokens((path,), tokenizer_file, DataConfig(max_tokens=100, truncation="drop"))
    assert (len(dropped), dropped.dropped, dropped.removed_tokens) == (2, 1, len(whole[1]))
    assert [tokens.where for tokens in dropped] == ["train.jsonl line 1", "train.jsonl line 3"]
    cut = read_tokens((path,), tokenizer_file, DataConfig(max_tokens=100, truncation="truncate-prompt"))
    assert (len(cut), cut.dropped, cut.removed_tokens) == (3, 0, len(whole[1]) - 100)
    assert len(cut[1]) == 100
    with pytest.raises(DataError, match="no examples; 1 were too long and left out"):
        read_tokens((write("long.jsonl", long),), tokenizer_file, DataConfig(max_tokens=100, truncation="drop"))
