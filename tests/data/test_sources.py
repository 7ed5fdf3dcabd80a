"""Files of every form hold the same records, and a folder's files are told apart by their names."""

import json
import sys

import pytest

from conversations import ANSWER, CALL, LAST, MORE, RESULT, SYSTEM, TOOLS, USER, seen
from mlx_afm.data import find_splits, read_examples, read_tokens
from mlx_afm.data.sources import iter_rows
from mlx_afm.errors import DataError, FormatError, MissingDependencyError

PAIRS = [{"prompt": 'a, "b"', "completion": "one\ntwo"}, {"prompt": "c\td", "completion": "naïve 東京 🎉"}]
# Structs of different keys: Arrow gives each of them every key, null where there was none.
CHATS = [
    {"messages": [SYSTEM, USER, CALL, RESULT, LAST], "tools": TOOLS},
    {"messages": [USER, ANSWER, MORE, LAST]},
]


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="the data extra is not installed (datasets)")


def records(*files):
    return [json.loads(row.text) for file in files for row in iter_rows(file)]


def taught(*files):
    return [seen(example) for example in read_examples(files)]


@pytest.fixture
def chats(write):
    """What the records of CHATS teach, by the plainest way."""
    return taught(write("plain.jsonl", *CHATS))


def test_json_lines_keep_their_bytes(write):
    lines = [b'{"a":  1}\r\n', b"\n", b"  \r\n", b'["\xff"]\n', b'{"b":2}']
    rows = list(iter_rows(write("a.jsonl", *lines)))
    assert [(row.line, row.text) for row in rows] == [(1, b'{"a":  1}'), (4, b'["\xff"]'), (5, b'{"b":2}')]


def test_an_array_of_records(write):
    path = write("a.json", '[\n  {"a": 1},\n\n  {"a":\n   2}\n]\n')
    assert [(row.line, json.loads(row.text)) for row in iter_rows(path)] == [(2, {"a": 1}), (4, {"a": 2})]
    assert records(write("b.json", json.dumps(CHATS, indent=2))) == CHATS
    assert records(write("c.json", "[]")) == []


def test_tables(write):
    csv = write("a.csv", 'prompt,completion\r\n"a, ""b""","one\ntwo"\r\n\r\nc\td,naïve 東京 🎉\r\n')
    tsv = write("a.tsv", 'prompt\tcompletion\n"a, ""b"""\t"one\ntwo"\n"c\td"\tnaïve 東京 🎉\n')
    assert records(csv) == records(tsv) == PAIRS
    assert [row.line for row in iter_rows(csv)] == [2, 5]
    assert [row.line for row in iter_rows(tsv)] == [2, 4]


def test_tables_whose_columns_are_named_by_the_caller(write):
    for text in ("a,b\n", "prompt,completion\na,b\n"):
        rows = list(iter_rows(write("a.csv", text), ["prompt", "completion"]))
        assert [json.loads(row.text) for row in rows] == [{"prompt": "a", "completion": "b"}]
    (row,) = iter_rows(write("a.csv", "a,b,c\n"), ["prompt", "completion"])
    assert "wrong number of columns (expected 2 columns" in str(row.fault)


def test_conversations_in_a_table(write):
    fields = [json.dumps([USER, ANSWER]), json.dumps(TOOLS)]
    quoted = ",".join('"' + field.replace('"', '""') + '"' for field in fields)
    path = write("a.csv", f"messages,tools\n{quoted}\n")
    plain = write("a.jsonl", {"messages": [USER, ANSWER], "tools": TOOLS})
    assert taught(path) == taught(plain)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_read_but_not_trained_on(name, encoding, write):
    text = {"json": '[{"prompt": "ä", "completion": "b"}]', "csv": "prompt,completion\nä,b\n"}
    text["tsv"] = text["csv"].replace(",", "\t")
    path = write(name, text.get(name[2:], '{"prompt": "ä", "completion": "b"}\n').encode(encoding))
    assert records(path) == [{"prompt": "ä", "completion": "b"}]
    with pytest.raises(DataError, match=r"byte order mark|wrong encoding"):
        read_examples((path,))


def parquet(datasets, path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(values).to_parquet(str(path))
    return path


def test_parquet(datasets, tmp_path, chats):
    assert records(parquet(datasets, tmp_path / "a.parquet", PAIRS)) == PAIRS
    path = parquet(datasets, tmp_path / "chats.parquet", CHATS)
    raw = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))[1]["messages"][0]
    assert raw["tool_calls"] is None, "the case this test is about"
    assert taught(path) == chats


def test_a_saved_data_set(datasets, tmp_path, chats, tokenizer_file):
    datasets.Dataset.from_list(CHATS).save_to_disk(str(tmp_path / "saved"))
    assert find_splits(tmp_path / "saved") == {"train": (tmp_path / "saved",)}
    assert taught(tmp_path / "saved") == chats
    table = read_tokens((tmp_path / "saved",), tokenizer_file, cache=tmp_path / "cache")
    assert [tokens.where for tokens in table] == ["saved line 1", "saved line 2"]


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_saved_dictionary_of_splits(datasets, tmp_path, validation):
    parts = {name: datasets.Dataset.from_list(PAIRS[:count]) for name, count in (("train", 2), (validation, 1))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    splits = find_splits(tmp_path)
    assert splits == {"train": (tmp_path / "train",), "valid": (tmp_path / validation,)}
    assert records(*splits["train"]) == PAIRS
    assert records(*splits["valid"]) == PAIRS[:1]


@pytest.mark.parametrize("folder", [".", "data"])
def test_a_split_in_pieces(datasets, tmp_path, folder):
    home = tmp_path / folder
    for number, pair in enumerate(PAIRS):
        parquet(datasets, home / f"train-{number:05}-of-00002.parquet", [pair])
    parquet(datasets, home / "validation-00000-of-00001-0123456789abcdef.parquet", PAIRS[:1])
    splits = find_splits(tmp_path)
    names = {split: [file.name for file in files] for split, files in splits.items()}
    assert names == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "valid": ["validation-00000-of-00001-0123456789abcdef.parquet"],
    }
    assert records(*splits["train"]) == PAIRS


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_without_the_library_it_is_said_what_to_install(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name == "saved":
        path.mkdir()
        for file in ("state.json", "dataset_info.json"):
            (path / file).write_text("{}")
    else:
        path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=rf"{name}: .*datasets library. pip install 'mlx-afm\[data\]'"):
        list(iter_rows(path))


def test_plain_files_need_no_library(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert records(write("a.jsonl", *PAIRS)) == records(write("a.json", json.dumps(PAIRS))) == PAIRS


def test_a_damaged_data_set_is_a_format_error(datasets, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no Parquet file")
    with pytest.raises(FormatError, match=r"a\.parquet"):
        list(iter_rows(tmp_path / "a.parquet"))
    saved = tmp_path / "saved"
    saved.mkdir()
    for file in ("state.json", "dataset_info.json"):
        (saved / file).write_text("{}")
    with pytest.raises(FormatError, match="saved"):
        list(iter_rows(saved))


def test_names_of_splits(write, tmp_path):
    assert find_splits(write("anything.csv", "x\n")) == {"train": (tmp_path / "anything.csv",)}
    for name in ("train.jsonl", "val.json", "test.tsv", "notes.txt", "training.jsonl", "train-extra.jsonl"):
        write(name, "")
    names = {split: [file.name for file in files] for split, files in find_splits(tmp_path).items()}
    assert names == {"train": ["train.jsonl"], "valid": ["val.json"], "test": ["test.tsv"]}
    for second in ("dev.jsonl", "valid.csv", "eval.jsonl"):
        write(second, "")
        with pytest.raises(FormatError, match="more than one valid split"):
            find_splits(tmp_path)
        (tmp_path / second).unlink()
    with pytest.raises(FormatError, match="no such file or folder"):
        find_splits(tmp_path / "none")
