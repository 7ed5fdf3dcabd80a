"""The fixed copy: good lines byte for byte, everything else left out and told, the source untouched."""

import json

import pytest
from planted import MAX_TOKENS, plant

from mlx_afm.data import DataConfig, find_splits, read_tokens
from mlx_afm.data.check import check_data
from mlx_afm.data.fix import fix_data
from mlx_afm.data.report import WARNINGS
from mlx_afm.errors import ConfigError, DataError, FormatError


def example(number):
    return [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": "ho"}]


def line(number):
    return json.dumps(example(number)).encode() + b"\n"


def changes(fixed):
    return [(change.line, change.kind) for change in fixed.changes]


def test_the_copy_of_the_planted_folder_is_right(tmp_path, tokenizer_file):
    plant(tmp_path / "data")
    splits, config = find_splits(tmp_path / "data"), DataConfig(max_tokens=MAX_TOKENS)
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    report = check_data(splits, config, tokenizer_file)
    fixed = fix_data(splits, tmp_path / "fixed", config, tokenizer_file)
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    assert fixed.report == report
    again = check_data(find_splits(tmp_path / "fixed"), config, tokenizer_file)
    assert again.ok
    assert set(again.counts) == set(WARNINGS) - {"duplicate"}
    lost = {"train": 3, "valid": 1, "test": 0}  # duplicates, and what a held-out split has too
    assert [(file.split, file.examples) for file in again.files] == [
        (file.split, file.examples - lost[file.split]) for file in report.files
    ]
    # Every line that is gone is told, once.
    told = {(change.file, change.line) for change in fixed.changes if change.message.startswith("left out")}
    assert len(told) == sum(fixed.counts.values()) - fixed.counts["wrong-encoding"]
    assert len(told) == sum(file.records for file in report.files) - sum(file.records for file in again.files)
    read_tokens(find_splits(tmp_path / "fixed")["train"], tokenizer_file, config)


def test_good_lines_are_copied_byte_for_byte(write, tmp_path):
    odd = b'  [{"content":"caf\\u00e9 \xc3\xa9","role":"user"} , {"role":"assistant","content":"x"}]\t'
    path = write("train.jsonl", line(1), odd + b"\n", b"{broken\n", line(2).strip())
    fixed = fix_data({"train": (path,)}, tmp_path / "fixed")
    assert fixed.files == (tmp_path / "fixed" / "train.jsonl",)
    assert fixed.files[0].read_bytes() == line(1) + odd + b"\n" + line(2)
    assert changes(fixed) == [(3, "bad-json")]
    assert fixed.changes[0].message == "left out: bad-json"


def test_marks_line_ends_and_blank_lines(write, tmp_path):
    path = write("train.jsonl", b"\xef\xbb\xbf" + (line(1) + b"\n \n" + line(2)).replace(b"\n", b"\r\n"))
    fixed = fix_data({"train": (path,)}, tmp_path / "fixed")
    assert fixed.files[0].read_bytes() == line(1) + line(2)
    assert [(change.line, change.message) for change in fixed.changes] == [
        (1, "the byte order mark was taken off"),
        (1, "4 lines ended with CR LF and now end with LF"),
        (2, "left out: a blank line"),
        (3, "left out: a blank line"),
    ]
    assert fixed.counts == {"blank-line": 2, "byte-order-mark": 1, "carriage-return": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_become_utf8(encoding, write, tmp_path):
    text = '[{"role": "user", "content": "東京 🎉"}, {"role": "assistant", "content": "x"}]\n'
    fixed = fix_data({"train": (write("train.jsonl", text.encode(encoding)),)}, tmp_path / "fixed")
    assert fixed.files[0].read_bytes() == text.encode()
    assert [change.message for change in fixed.changes] == [f"written as UTF-8, was {encoding.upper()}"]


def test_duplicates_go_and_held_out_examples_stay(write, tmp_path):
    splits = {
        "train": (write("train.jsonl", *map(example, (1, 2, 1, 3, 4, 4))),),
        "valid": (write("valid.jsonl", *map(example, (3, 5, 6))),),
        "test": (write("test.jsonl", *map(example, (4, 6, 7, 7))),),
    }
    fixed = fix_data(splits, tmp_path / "fixed")
    assert [path.read_bytes() for path in fixed.files] == [
        line(1) + line(2),
        line(3) + line(5),
        line(4) + line(6) + line(7),
    ]
    assert [(change.file.split("/")[-1], change.line, change.kind) for change in fixed.changes] == [
        ("train.jsonl", 3, "duplicate"),
        ("train.jsonl", 4, "overlap"),
        ("train.jsonl", 5, "overlap"),
        ("train.jsonl", 6, "duplicate"),
        ("valid.jsonl", 3, "overlap"),
        ("test.jsonl", 4, "duplicate"),
    ]
    assert check_data(find_splits(tmp_path / "fixed")).counts == {}


def test_other_forms_become_json_lines(write, tmp_path):
    table = write("train.csv", b'prompt,completion,note\na,b,1\n"two\nlines",c,2\nd,,3\n')
    array = write("valid.json", json.dumps([example(1), 3, example(2), example(1)]).encode())
    splits = {"train": (table,), "valid": (array,)}
    fixed = fix_data(splits, tmp_path / "fixed")
    assert [path.name for path in fixed.files] == ["train.jsonl", "valid.jsonl"]
    assert [json.loads(text) for text in fixed.files[0].read_text().splitlines()] == [
        {"prompt": "a", "completion": "b", "note": "1"},
        {"prompt": "two\nlines", "completion": "c", "note": "2"},
    ]
    assert [json.loads(text) for text in fixed.files[1].read_text().splitlines()] == [example(1), example(2)]
    assert changes(fixed) == [
        (1, "other-form"),
        (5, "empty-answer"),
        (1, "other-form"),
        (2, "unknown-form"),
        (4, "duplicate"),
    ]
    assert check_data(find_splits(tmp_path / "fixed")).counts == {}


def test_the_same_options_read_the_copy(write, tmp_path):
    path = write("train.jsonl", {"question": "a", "completion": "b"}, {"question": "a"})
    config = DataConfig(data_format="prompt-completion", fields=(("prompt", "question"),))
    fixed = fix_data({"train": (path,)}, tmp_path / "fixed", config)
    assert fixed.counts == {"unknown-form": 1}
    assert check_data({"train": fixed.files}, config).ok


def test_what_truncation_drops_is_left_out_and_what_it_cuts_stays(write, tmp_path, tokenizer_file):
    long = [{"role": "user", "content": "words " * 200}, {"role": "assistant", "content": "x"}]
    path = write("train.jsonl", long, example(1))
    for truncation, kept in (("error", 1), ("drop", 1), ("truncate-prompt", 2)):
        config = DataConfig(max_tokens=100, truncation=truncation)
        fixed = fix_data({"train": (path,)}, tmp_path / truncation, config, tokenizer_file)
        assert len(fixed.files[0].read_bytes().splitlines()) == kept
        assert changes(fixed) == ([(1, "too-long")] if kept == 1 else [])


def test_pieces_of_a_split_keep_their_names_and_empty_ones_go(write, tmp_path):
    pieces = tuple(
        write(f"train-0000{n}-of-00003.jsonl", content) for n, content in enumerate((line(1), b"{", line(1)))
    )
    fixed = fix_data({"train": pieces}, tmp_path / "fixed")
    assert [path.name for path in (tmp_path / "fixed").iterdir()] == [pieces[0].name]
    assert [change.message for change in fixed.changes] == [
        "left out: bad-json",
        "the file was left out: no example remains",
        "left out: the same example stands before it",
        "the file was left out: no example remains",
    ]


def test_changes_are_counted_beyond_those_kept(write, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_afm.data.fix.MAX_KEPT", 2)
    fixed = fix_data({"train": (write("train.jsonl", *[b"{\n"] * 5, line(1)),)}, tmp_path / "fixed")
    assert changes(fixed) == [(1, "bad-json"), (2, "bad-json")]
    assert fixed.to_dict()["counts"] == {"bad-json": 5}


def test_nothing_is_written_over_or_half(write, tmp_path):
    path, target = write("data/train.jsonl", line(1)), tmp_path / "fixed"
    target.mkdir()
    fix_data({"train": (path,)}, target)
    for taken in (target, path, path.parent):
        with pytest.raises(ConfigError, match="exists"):
            fix_data({"train": (path,)}, taken)
    with pytest.raises(DataError, match="no example would be left"):
        fix_data({"train": (write("data/bad.jsonl", b"{"),)}, tmp_path / "empty")
    with pytest.raises(FormatError, match="no copy of it"):
        fix_data({"train": (path,), "test": (tmp_path / "gone.jsonl",)}, tmp_path / "gone")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "fixed"]
    assert path.read_bytes() == line(1)
