"""Any data format and form to any other: the same conversations, or a refusal that names the line."""

import csv
import json

import pytest

from conversations import CONVERSATIONS, read, seen, seen_of
from mlx_afm.data import DataConfig, read_tokens
from mlx_afm.data.convert import FLAT, convert_data
from mlx_afm.data.data_formats import DATA_FORMATS
from mlx_afm.data.sources import iter_rows
from mlx_afm.errors import ConfigError, DataError

# What a data format has no words for.
TOOLED = {"tools", "own-tools", "format", "system-format", "words-and-call", "dict-result", "ends-in-a-call"}
SPOKEN = set(CONVERSATIONS) - {"text"}
UNSAYABLE = {
    "toolkit": {"text"},
    "messages": {"text"},
    "prompt-completion": {"text"},
    "prompt-response": {"text"},
    "instruction": {"text", "empty-system", "weights", "weighted-call", "greeting", *TOOLED},
    "sharegpt": {"text", "empty-system", "format", "system-format", "words-and-call", "dict-result"},
    "text": SPOKEN,
}


def record_of(name):
    messages, tools, text = CONVERSATIONS[name]
    return {"text": text} if text else {"messages": messages, **({"tools": tools} if tools else {})}


def rows(path):
    return [json.loads(row.text) for row in iter_rows(path)]


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_can_be_said_is_said_and_the_rest_refused(name, data_format, write, tmp_path):
    source, target = write("a.jsonl", record_of(name)), tmp_path / "b.jsonl"
    if name in UNSAYABLE[data_format]:
        with pytest.raises(DataError, match=f"a.jsonl line 1: the data format {data_format} cannot say this"):
            convert_data((source,), target, data_format)
        assert not target.exists()
        return
    assert convert_data((source,), target, data_format) == 1
    (record,) = rows(target)
    assert seen(read(record)) == seen(read(record, data_format)) == seen_of(name)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_there_and_back_the_tokens_are_the_same(data_format, write, tmp_path, tokenizer_file):
    sayable = [name for name in CONVERSATIONS if name not in UNSAYABLE[data_format]]
    first = write("first.jsonl", *map(record_of, sayable))
    there, back = tmp_path / "there.jsonl", tmp_path / "back.jsonl"
    convert_data((first,), there, data_format)
    again = "text" if data_format == "text" else "messages"
    assert convert_data((there,), back, again, DataConfig(data_format=data_format)) == len(sayable)
    tables = [read_tokens((path,), tokenizer_file) for path in (first, there, back)]
    for table in tables[1:]:
        assert (table.ids == tables[0].ids).all()
        assert (table.trained == tables[0].trained).all()
        assert (table.starts == tables[0].starts).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("data_format", FLAT)
def test_every_form_that_holds_it(data_format, suffix, write, tmp_path, tokenizer_file):
    names = ["text"] if data_format == "text" else ["pair", "system", "like-json", "turns"]
    source, target = write("a.jsonl", *map(record_of, names)), tmp_path / f"b{suffix}"
    assert convert_data((source,), target, data_format) == len(names)
    one, other = (read_tokens((path,), tokenizer_file) for path in (source, target))
    assert (one.ids == other.ids).all()
    assert (one.trained == other.trained).all()
    assert target.read_bytes().endswith(b"\n")


def test_forms_literally(write, tmp_path):
    source = write(
        "a.jsonl", {"prompt": 'say "a"', "response": "ä,\nb"}, {"prompt": "q", "response": "r", "system": "s"}
    )
    first = '{"prompt": "say \\"a\\"", "completion": "ä,\\nb"}'
    second = '{"system": "s", "prompt": "q", "completion": "r"}'
    expected = {
        "x.jsonl": f"{first}\n{second}\n",
        "x.json": f"[\n{first},\n{second}\n]\n",
        "x.csv": '"system","prompt","completion"\n"","say ""a""","ä,\nb"\n"s","q","r"\n',
        "x.tsv": '"system"\t"prompt"\t"completion"\n""\t"say ""a"""\t"ä,\nb"\n"s"\t"q"\t"r"\n',
    }  # fmt: skip
    for name, text in expected.items():
        convert_data((source,), tmp_path / name, "prompt-completion")
        assert (tmp_path / name).read_bytes().decode() == text


def pairs(path, data_format, header):
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, dialect=data_format)
        writer.writerows(([header] if header else []) + [["a, b", 'c "d"'], ["two\nlines", "tab\there"]])
    return path


@pytest.mark.parametrize(("suffix", "data_format"), [(".csv", "excel"), (".tsv", "excel-tab")])
@pytest.mark.parametrize("header", [None, ["prompt", "completion"]])
def test_text_pairs_with_and_without_names(suffix, data_format, header, tmp_path):
    source = pairs(tmp_path / f"pairs{suffix}", data_format, header)
    count = convert_data((source,), tmp_path / "out.jsonl", "messages", columns=["prompt", "completion"])
    texts = [[message["content"] for message in record["messages"]] for record in rows(tmp_path / "out.jsonl")]
    assert (count, texts) == (2, [["a, b", 'c "d"'], ["two\nlines", "tab\there"]])


def test_text_pairs_of_other_names(tmp_path):
    source = pairs(tmp_path / "pairs.csv", "excel", ["question", "answer"])
    data_config = DataConfig(fields=(("prompt", "question"), ("completion", "answer")))
    assert convert_data((source,), tmp_path / "out.jsonl", "prompt-completion", data_config) == 2
    assert rows(tmp_path / "out.jsonl")[0] == {"prompt": "a, b", "completion": 'c "d"'}


def test_all_faulty_lines_in_one_error_and_nothing_written(write, tmp_path):
    target = write("b.jsonl", "as it was\n")
    source = write("a.jsonl", record_of("pair"), "{\n", record_of("turns"), record_of("tools"), record_of("text"))
    with pytest.raises(DataError, match=r"3 line\(s\) cannot be converted. Nothing was written") as error:
        convert_data((source,), target, "instruction")
    assert "a.jsonl line 2, column 2: not JSON" in str(error.value)
    assert "a.jsonl line 4: the data format instruction cannot say this: it has no place for tools" in str(error.value)
    assert "line 5: the data format instruction cannot say this: plain text is no conversation" in str(error.value)
    assert target.read_text() == "as it was\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_transform_is_applied(write, tmp_path, monkeypatch):
    (tmp_path / "convert_transform.py").write_text(
        "def f(messages, index):\n    return [{**m, 'content': f'{index}{m[\"content\"]}'} for m in messages]\n"
    )
    monkeypatch.chdir(tmp_path)
    source = write("a.jsonl", *[{"prompt": "q", "completion": "a"}] * 2)
    convert_data((source,), tmp_path / "b.jsonl", "prompt-response", DataConfig(transform="convert_transform:f"))
    assert rows(tmp_path / "b.jsonl")[1] == {"prompt": "1q", "response": "1a"}


def test_settings_that_make_no_sense(write, tmp_path):
    source = write("a.jsonl", record_of("pair"))
    for target, data_format, columns, fault in [
        ("b.jsonl", "alpaca", (), "no such data format .*found alpaca"),
        ("b.csv", "messages", (), "a table holds flat records only .*found messages for b.csv"),
        ("b.tsv", "sharegpt", (), "a table holds flat records only"),
        ("b.parquet", "text", (), "cannot write this"),
        ("b", "text", (), "cannot write this"),
        ("a.jsonl", "text", (), "the result would replace its source"),
        ("b.jsonl", "messages", ("a", "b"), "only tables have columns to name"),
    ]:
        with pytest.raises(ConfigError, match=fault):
            convert_data((source,), tmp_path / target, data_format, columns=columns)
    table = write("a.csv", "x,y\n")
    for columns in (("a", "a"), ("a", "")):
        with pytest.raises(ConfigError, match="columns need names, each its own"):
            convert_data((table,), tmp_path / "b.jsonl", "messages", columns=columns)
    with pytest.raises(DataError, match="no examples"):
        convert_data((table,), tmp_path / "b.jsonl", "messages")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.jsonl"]
