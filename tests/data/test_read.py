"""A split to a table of tokens: all faults at once, the same tokens by every way, and the cache."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlx_afm.data import DataConfig, read_examples, read_tokens
from mlx_afm.data import workers as workers_module
from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.text.template import SPECIAL_TOKENS

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TRANSFORM = """
def shout(messages, index):
    print("noise on stdout")
    return [{**message, "content": f"{message['content'].upper()} {index}"} for message in messages]

def fail(messages, index):
    raise KeyError("nothing here")

def end(messages, index):
    import os
    os._exit(7)
"""


@pytest.fixture
def transform_module(tmp_path, monkeypatch):
    """A module of the user's in the current folder; its name."""
    name = f"my_transform_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(TRANSFORM)
    monkeypatch.chdir(tmp_path)
    return name


def many(count):
    """Conversations, all different."""
    return [
        [{**USER, "content": f"request number {i}"}, {**ANSWER, "content": f"answer {i * i}"}] for i in range(count)
    ]


def same(one, other):
    return (one.ids == other.ids).all() and (one.trained == other.trained).all() and (one.places == other.places).all()


def test_every_faulty_line_is_named_in_one_error(write, tokenizer_file):
    path = write(
        "train.jsonl",
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
        read_tokens((path,), tokenizer_file)
    message = str(error.value)
    assert "6 faulty line(s)" in message
    for number in (2, 4, 5, 6, 7, 8):
        assert f"train.jsonl line {number}" in message
    assert "line 2, column 2: not JSON" in message
    assert "line 1:" not in message
    assert "line 3" not in message
    with pytest.raises(DataError, match="6 faulty line"):
        read_examples((path,), SPECIAL_TOKENS)


def test_files_that_are_none(write, tokenizer_file, tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        read_tokens((tmp_path / "train.jsonl",), tokenizer_file)
    with pytest.raises(DataError, match="no examples"):
        read_tokens((write("empty.jsonl", "\n"),), tokenizer_file)
    with pytest.raises(DataError, match="line 2, column 2: not UTF-8"):
        read_tokens((write("latin.jsonl", "\n", b"[\xe9]\n"),), tokenizer_file)
    with pytest.raises(DataError, match="line 1: JSON nested too deeply"):
        read_tokens((write("deep.jsonl", "[" * 100_000 + "]" * 100_000),), tokenizer_file)
    with pytest.raises(DataError, match="byte order mark"):
        read_tokens((write("bom.jsonl", b"\xef\xbb\xbf", [USER, ANSWER]),), tokenizer_file)


def test_every_assistant_turn_is_trained_with_its_end(write, tokenizer, tokenizer_file):
    path = write("train.jsonl", "\n", [USER, ANSWER, USER, {"role": "assistant", "content": "ls"}])
    (tokens,) = read_tokens((path,), tokenizer_file)
    trained = tokens.ids[tokens.weights > 0].tolist()
    assert tokenizer.decode(trained) == "ho<turn_end>ls<turn_end>"
    assert tokens.weights[0] == 0
    assert tokens.trained_tokens == len(trained) == 2 + sum(token != tokenizer.turn_end_id for token in trained)
    assert tokens.where == "train.jsonl line 2"


def test_plain_text_is_trained_as_a_whole(write, tokenizer, tokenizer_file):
    (tokens,) = read_tokens((write("train.jsonl", {"text": "one\ntwo"}),), tokenizer_file)
    assert tokens.ids.tolist() == [tokenizer.eos_id, *tokenizer.encode("one\ntwo"), tokenizer.eos_id]
    assert tokens.weights.tolist() == [0] + [1] * (len(tokens) - 1)


def test_tools_of_a_record_reach_the_system_turn(write, tokenizer, tokenizer_file):
    path = write("train.jsonl", {"messages": [USER, ANSWER], "tools": [{"name": "look"}]})
    (tokens,) = read_tokens((path,), tokenizer_file)
    assert 'system tools: {"name": "look"}<turn_end>' in tokenizer.decode(tokens.ids.tolist())


def test_the_system_message_can_be_chosen_or_left_out(write, tokenizer, tokenizer_file):
    own = [{"role": "system", "content": "mine"}, USER, ANSWER]
    path = write("train.jsonl", [USER, ANSWER], own)
    heads = {}
    for system in ("be brief", None):
        table = read_tokens((path,), tokenizer_file, DataConfig(system=system))
        heads[system] = [tokenizer.decode(tokens.ids[1:].tolist()).split("<turn_end>")[0] for tokens in table]
    assert heads["be brief"] == ["<turn_start> system\nbe brief", "<turn_start> system\nmine"]
    assert heads[None] == ["<turn_start> user\nhi", "<turn_start> system\nmine"]


def test_files_of_a_split_follow_each_other(write, tokenizer_file):
    files = (write("a.jsonl", [USER, ANSWER]), write("b.jsonl", "\n", [USER, ANSWER], [USER, ANSWER]))
    table = read_tokens(files, tokenizer_file)
    assert [tokens.where for tokens in table] == ["a.jsonl line 1", "b.jsonl line 2", "b.jsonl line 3"]
    assert table.lengths.tolist() == [len(tokens) for tokens in table]
    assert [len(tokens) for tokens in table[1:]] == table.lengths[1:].tolist()
    assert table[-1].where == "b.jsonl line 3"
    with pytest.raises(IndexError):
        table[3]


def test_the_tokenizer_is_read_again_when_it_changed_or_another_thread_asks(tokenizer_file, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_file.read_bytes())
    opened = workers_module.to_tokenizer
    first = opened(path)
    assert opened(path) is first
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(opened, path).result() is not first
    first = opened(path)
    os.utime(path, ns=(1, 1))
    assert opened(path) is not first
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        opened(path)


def test_workers_give_what_one_process_gives(write, tokenizer_file, monkeypatch):
    monkeypatch.setattr("mlx_afm.data.prepare.BLOCK_BYTES", 500)
    path = write("train.jsonl", *many(300))
    assert same(read_tokens((path,), tokenizer_file, workers=1), read_tokens((path,), tokenizer_file, workers=3))


def test_faults_found_by_workers_are_the_same(write, tokenizer_file, monkeypatch):
    monkeypatch.setattr("mlx_afm.data.prepare.BLOCK_BYTES", 500)
    path = write("train.jsonl", *many(200), "{\n", *many(100), [USER])
    messages = []
    for workers in (1, 2):
        with pytest.raises(DataError, match="2 faulty line") as error:
            read_tokens((path,), tokenizer_file, workers=workers)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "line 201" in messages[0]
    assert "line 302" in messages[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_transform_changes_messages(write, tokenizer, tokenizer_file, transform_module, monkeypatch, workers):
    monkeypatch.setattr("mlx_afm.data.prepare.BLOCK_BYTES", 500)
    path = write("train.jsonl", *many(200))
    config = DataConfig(transform=f"{transform_module}:shout")
    table = read_tokens((path,), tokenizer_file, config, workers=workers)
    assert tokenizer.decode(table[150].ids.tolist()).endswith("assistant\nANSWER 22500 150<turn_end>")


def test_transforms_that_fail(write, tokenizer_file, transform_module, monkeypatch):
    path = write("train.jsonl", *many(2))
    with pytest.raises(DataError, match=r"line 2: the transform failed \(found KeyError: 'nothing here'\)"):
        read_tokens((path,), tokenizer_file, DataConfig(transform=f"{transform_module}:fail"))
    for name in (f"{transform_module}:none", "no_such_module:f"):
        with pytest.raises(ConfigError, match="no such transform"):
            read_tokens((path,), tokenizer_file, DataConfig(transform=name))
    monkeypatch.setattr("mlx_afm.data.prepare.BLOCK_BYTES", 500)
    path = write("train.jsonl", *many(200))
    with pytest.raises(ConfigError, match=r"a process that prepares the data ended .*exit code 7"):
        read_tokens((path,), tokenizer_file, DataConfig(transform=f"{transform_module}:end"), workers=2)


def entries(cache):
    return sorted((cache / "tokens").iterdir())


def test_the_cache_gives_the_same_and_reads_no_record(write, tokenizer_file, tmp_path, monkeypatch):
    path, cache = write("train.jsonl", *many(30)), tmp_path / "cache"
    first = read_tokens((path,), tokenizer_file, cache=cache)
    monkeypatch.setattr(workers_module, "Preparer", None)  # nothing is prepared any more
    second = read_tokens((path,), tokenizer_file, cache=cache)
    assert same(first, second)
    assert [tokens.where for tokens in second] == [tokens.where for tokens in first]
    assert isinstance(second.ids, np.memmap)


def test_the_cache_knows_what_changes_tokens(write, tokenizer_file, tmp_path, transform_module):
    cache = tmp_path / "cache"
    path = write("train.jsonl", *many(3))

    def read(**settings):
        read_tokens((path,), tokenizer_file, DataConfig(**settings), cache=cache)
        return len(entries(cache))

    assert [read(), read(), read(system="x"), read(system=None), read(max_tokens=100)] == [1, 1, 2, 3, 4]
    assert [read(transform=f"{transform_module}:shout")] * 2 == [5] * 2
    write("train.jsonl", *many(4))
    assert read() == 6


def test_faulty_data_and_full_disks_leave_no_entry(write, tokenizer_file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with pytest.raises(DataError):
        read_tokens((write("bad.jsonl", "{"),), tokenizer_file, cache=cache)
    assert not cache.exists()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", no_space)
    path = write("train.jsonl", *many(3))
    assert len(read_tokens((path,), tokenizer_file, cache=cache)) == 3
    assert entries(cache) == []


def test_entries_unused_for_a_month_go(write, tokenizer_file, tmp_path):
    cache = tmp_path / "cache"
    read_tokens((write("old.jsonl", *many(3)),), tokenizer_file, cache=cache)
    (old,) = entries(cache)
    os.utime(old / "meta.json", (time.time() - 31 * 86400,) * 2)
    read_tokens((write("new.jsonl", *many(4)),), tokenizer_file, cache=cache)
    assert len(entries(cache)) == 1
    assert entries(cache) != [old]


def test_a_record_of_the_data_formats_own_field_names(write, tokenizer, tokenizer_file):
    path = write("train.jsonl", {"q": "why", "a": "because"})
    config = DataConfig(fields=(("prompt", "q"), ("completion", "a")))
    (tokens,) = read_tokens((path,), tokenizer_file, config)
    assert tokenizer.decode(tokens.ids[tokens.weights > 0].tolist()) == "because<turn_end>"
    with pytest.raises(DataError, match="of no data format we know"):
        read_tokens((path,), tokenizer_file)


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as error:
        DataConfig(data_format="x", truncation="y", max_tokens=1, transform="no_colon", system=" z")
    assert len(error.value.details) == 5


def test_examples_and_tokens_come_from_the_same_records(write, tokenizer, tokenizer_file):
    path = write("train.jsonl", *many(5), {"text": "plain"})
    examples = read_examples((path,), tokenizer.special_pieces)
    table = read_tokens((path,), tokenizer_file)
    assert [example.where for example in examples] == [tokens.where for tokens in table]
    assert examples[-1].text == "plain"
    assert json.dumps(examples[1].messages[0].content) == '"request number 1"'
