"""Examples shown are the tokens of training, and their texts are the rendered conversation."""

import pytest

from conversations import CONVERSATIONS
from mlx_afm.data import DataConfig, read_tokens
from mlx_afm.data.sample import ExampleChoice, sample_examples
from mlx_afm.errors import ConfigError, DataError
from mlx_afm.text.template import DEFAULT_SYSTEM

PAIR = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "ls\n-a"}]


def talk(count):
    return [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(count)]


def test_an_example_literally(write, tokenizer):
    (sample,) = sample_examples((write("a.jsonl", "\n", PAIR),), tokenizer)
    assert sample.texts == (
        (
            f"</s><turn_start> system\n{DEFAULT_SYSTEM}<turn_end><turn_start> user\none\ntwo<turn_end>"
            "<turn_start> assistant\n",
            False,
        ),
        ("ls\n-a<turn_end>", True),
    )
    assert (sample.line, sample.data_format, sample.removed_tokens) == (2, "toolkit", 0)
    assert [token.piece for token in sample.tokens][:4] == ["</s>", "<turn_start>", "▁system", "<n>"]
    values = sample.to_dict(with_ids=True)
    assert values["ids"][0] == {"id": tokenizer.eos_id, "piece": "</s>", "trained": False}
    assert (values["tokens"], values["trained_tokens"]) == (
        len(values["ids"]),
        sum(t["trained"] for t in values["ids"]),
    )
    assert "ids" not in sample.to_dict(with_ids=False)


def test_tokens_are_those_of_training(write, tokenizer, tokenizer_file):
    records = [{"text": text} if text else {"messages": m, "tools": tools} for m, tools, text in CONVERSATIONS.values()]
    files = (write("a.jsonl", *records),)
    for config in (DataConfig(), DataConfig(system="other"), DataConfig(max_tokens=90, truncation="truncate-answer")):
        kept = [s for s in sample_examples(files, tokenizer, ExampleChoice(count=99), config) if s.tokens]
        for sample, tokens in zip(kept, read_tokens(files, tokenizer_file, config), strict=True):
            assert [token.id for token in sample.tokens] == tokens.ids.tolist()
            assert [token.trained for token in sample.tokens] == (tokens.weights > 0).tolist()
            assert "".join(text for text, _ in sample.texts).replace("</s>", "") == tokenizer.decode(
                tokens.ids.tolist()
            )
            trained = "".join(text for text, trained in sample.texts if trained).replace("</s>", "")
            assert trained == tokenizer.decode(tokens.ids[tokens.weights > 0].tolist())


def test_plain_text_is_trained_but_for_its_start(write, tokenizer):
    (sample,) = sample_examples((write("a.jsonl", {"text": "one\ntwo"}),), tokenizer)
    assert sample.texts == (("</s>", False), (" one\ntwo</s>", True))


def test_the_first_ones(write, tokenizer):
    files = (write("a.jsonl", *talk(2)), write("b.jsonl", *talk(5)))
    places = [(sample.file[-7:], sample.line) for sample in sample_examples(files, tokenizer, ExampleChoice(count=4))]
    assert places == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1), ("b.jsonl", 2)]
    assert len(sample_examples(files, tokenizer, ExampleChoice(count=100))) == 7


def test_random_ones(write, tokenizer):
    files = (write("a.jsonl", *talk(40)),)
    lines = [tuple(s.line for s in sample_examples(files, tokenizer, ExampleChoice(5, seed))) for seed in range(60)]
    assert lines[7] == tuple(s.line for s in sample_examples(files, tokenizer, ExampleChoice(5, 7)))
    assert all(len(set(chosen)) == 5 and list(chosen) == sorted(chosen) for chosen in lines)
    assert len(set(lines)) == 60
    counts = [sum(line in chosen for chosen in lines) for line in range(1, 41)]
    assert min(counts) >= 1
    assert max(counts) <= 20
    assert len(sample_examples(files, tokenizer, ExampleChoice(50, 1))) == 40


def test_one_line(write, tokenizer):
    files = (write("a.jsonl", "\n", *talk(3)),)
    (sample,) = sample_examples(files, tokenizer, ExampleChoice(line=3))
    assert sample.texts[-1][0] == "a1<turn_end>"
    for line in (1, 5):
        with pytest.raises(DataError, match=f"no example in line {line}"):
            sample_examples(files, tokenizer, ExampleChoice(line=line))


def test_what_truncation_leaves(write, tokenizer):
    long = [{"role": "user", "content": "word " * 50}, PAIR[1]]
    files = (write("a.jsonl", long),)
    with pytest.raises(DataError, match=r"a.jsonl: a faulty example\n  a.jsonl line 1: too long"):
        sample_examples(files, tokenizer, config=DataConfig(max_tokens=80))
    (cut,) = sample_examples(files, tokenizer, config=DataConfig(max_tokens=80, truncation="truncate-prompt"))
    assert len(cut.tokens) == 80
    (gone,) = sample_examples(files, tokenizer, config=DataConfig(max_tokens=80, truncation="drop"))
    assert (gone.tokens, gone.texts) == ((), ())
    assert gone.removed_tokens == cut.removed_tokens + 80


def test_what_cannot_be_shown(write, tokenizer):
    with pytest.raises(DataError, match=r"a.jsonl: a faulty example\n  a.jsonl line 2, column 2: not JSON"):
        sample_examples((write("a.jsonl", PAIR, "{\n"),), tokenizer)
    with pytest.raises(DataError, match="no examples"):
        sample_examples((write("b.jsonl", ""),), tokenizer)
    with pytest.raises(ConfigError, match="expected at least 1 example, found 0"):
        ExampleChoice(count=0)
    with pytest.raises(ConfigError, match="two ways to choose"):
        ExampleChoice(line=1, seed=1)
