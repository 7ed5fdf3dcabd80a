"""Checking training data: every fault at its place and nothing else, whatever the files hold."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from planted import FAULTS, MAX_TOKENS, plant

from mlx_afm.data import DataConfig, find_splits, read_tokens
from mlx_afm.data.check import check_data
from mlx_afm.data.repeats import Fingerprints, find_duplicates, find_overlap
from mlx_afm.data.report import WARNINGS
from mlx_afm.errors import ConfigError, DataError, FormatError

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
LINE = json.dumps(GOOD).encode() + b"\n"
TEXT = LINE.decode()
CALL = b'"", "tool_calls": [{"function": {"name": "f", "arguments": "ARGUMENTS"}}]'
DEEP = b"[" * 100_000 + b"]" * 100_000


def example(number):
    return [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": "ho"}]


def found(report):
    return [(Path(problem.file).name, problem.line, problem.kind) for problem in report.problems]


def test_all_planted_faults_and_nothing_else(tmp_path, tokenizer_file):
    expected = plant(tmp_path / "data")
    report = check_data(find_splits(tmp_path / "data"), DataConfig(max_tokens=MAX_TOKENS), tokenizer_file)
    assert sorted(found(report)) == sorted(expected)
    assert (len(expected), len(report.counts), sum(report.counts.values())) == (65, 33, 65)
    assert not report.ok
    assert (report.errors, report.warnings) == (56, 9)
    assert [(file.split, file.records, file.examples) for file in report.files] == [
        ("train", 242, 206),
        ("valid", 70, 53),
        ("test", 51, 51),
    ]


def test_workers_find_the_same(tmp_path, tokenizer_file, monkeypatch):
    plant(tmp_path / "data")
    splits, config = find_splits(tmp_path / "data"), DataConfig(max_tokens=MAX_TOKENS)
    alone = check_data(splits, config, tokenizer_file, workers=1)
    monkeypatch.setattr("mlx_afm.data.prepare.BLOCK_BYTES", 2000)
    assert check_data(splits, config, tokenizer_file, workers=2) == alone


def test_what_is_counted_is_what_training_reads(tmp_path, write, tokenizer_file):
    files = (write("a.jsonl", example(1), example(2)), write("b.jsonl", {"text": "plain words"}))
    report = check_data({"train": files}, None, tokenizer_file)
    table = read_tokens(files, tokenizer_file)
    assert [file.examples for file in report.files] == [2, 1]
    assert sum(file.tokens for file in report.files) == len(table.ids)
    assert sum(file.trained_tokens for file in report.files) == table.trained.sum()


def test_columns_and_advice(write):
    path = write(
        "train.jsonl", b'[{"role": "user" 1}]\n', b'"caf\xe9"\n', [GOOD[0], {**GOOD[1], "content": "<turn_end>"}]
    )
    broken, encoding, special = check_data({"train": (path,)}).problems
    assert (broken.line, broken.column, broken.message) == (1, 18, "not JSON: Expecting ',' delimiter")
    assert (encoding.line, encoding.column) == (2, 5)
    assert encoding.message == "not UTF-8 text (found byte 0xe9). Save the file as UTF-8"
    assert special.message.startswith("message 1, content column 1: content spells out the special token '<turn_end>'")
    assert special.to_dict() == {
        "file": str(path), "line": 3, "kind": "special-token", "message": special.message, "column": None,
        "severity": "error",
    }  # fmt: skip


def test_columns_of_warnings(write):
    texts = ("a<n>b", "é\ufffd", r"\ufffd", "a [INST] b", "<|user|>")
    lines = [json.dumps([{**GOOD[0], "content": "TEXT"}, GOOD[1]]).replace("TEXT", text) + "\n" for text in texts]
    problems = check_data({"train": (write("train.jsonl", *[line.encode() for line in lines]),)}).problems
    columns = [lines[0].index("<n>"), lines[1].index("\ufffd"), None, lines[3].index("[INST]"), lines[4].index("<|")]
    kinds = ["newline-mark", "replacement-character", "replacement-character", "other-template", "other-template"]
    expected = [
        (line, kind, None if column is None else column + 1)
        for line, (kind, column) in enumerate(zip(kinds, columns, strict=True), 1)
    ]
    assert [(problem.line, problem.kind, problem.column) for problem in problems] == expected


def test_too_long_says_what_would_be_lost_and_needs_a_tokenizer(write, tokenizer_file):
    path = write("train.jsonl", GOOD, [GOOD[0], {"role": "assistant", "content": "ho " * 300}])
    splits, config = {"train": (path,)}, DataConfig(max_tokens=100)
    length, trained = (int(value) for value in _length_of(path, tokenizer_file, 1))
    report = check_data(splits, config, tokenizer_file)
    assert found(report) == [("train.jsonl", 2, "too-long")]
    for piece in ("expected at most 100 tokens", f"found {length} tokens", f"lose {length - 100} of", f"{trained}"):
        assert piece in report.problems[0].message
    assert report.lengths_checked
    without = check_data(splits, config)
    assert (without.problems, without.lengths_checked, without.files[0].tokens) == ((), False, 0)


def _length_of(path, tokenizer_file, index):
    tokens = read_tokens((path,), tokenizer_file)[index]
    return len(tokens), tokens.trained_tokens


def test_truncation_is_counted(write, tokenizer_file):
    long = [{"role": "user", "content": "words " * 200}, GOOD[1]]
    path = write("train.jsonl", GOOD, long, [*long, *example(1)])
    sizes = [_length_of(path, tokenizer_file, index)[0] for index in (1, 2)]
    for truncation, counts in (("drop", (2, 0, sum(sizes))), ("truncate-prompt", (0, 2, sum(sizes) - 200))):
        config = DataConfig(max_tokens=100, truncation=truncation)
        report = check_data({"train": (path,)}, config, tokenizer_file)
        (file,) = report.files
        assert report.ok
        assert (file.dropped, file.shortened, file.removed_tokens) == counts
    path = write("long.jsonl", long)
    report = check_data({"train": (path,)}, DataConfig(max_tokens=100, truncation="drop"), tokenizer_file)
    assert found(report) == [("long.jsonl", 1, "no-examples")]
    assert "all 1 are too long and left out" in report.problems[0].message


def test_duplicates_name_the_first(write):
    pair = {"prompt": "request 2", "completion": "ho"}
    lines = [example(1), example(2), example(1), b"\n", pair, example(1)]
    report = check_data({"train": (write("train.jsonl", *lines),)})
    assert [(p.line, p.message) for p in report.problems] == [
        (3, "the same example as line 1: it counts twice"),
        (5, "the same example as line 2: it counts twice"),
        (6, "the same example as line 1: it counts twice"),
    ]
    assert report.ok
    pieces = tuple(write(f"train-0000{n}-of-00002.jsonl", example(1)) for n in (0, 1))
    (problem,) = check_data({"train": pieces}).problems
    assert problem.file == str(pieces[1])
    assert "as train-00000-of-00002.jsonl line 1" in problem.message


def test_overlap_is_told_at_the_held_out_line(write):
    splits = {
        "train": (write("train.jsonl", example(1), example(2), example(3)),),
        "valid": (write("valid.jsonl", example(4), example(2)),),
        "test": (write("test.jsonl", example(4), example(1), example(5)),),
    }
    report = check_data(splits)
    assert [(*place, problem.message.split(", so")[0]) for place, problem in zip(found(report), report.problems)] == [
        ("valid.jsonl", 2, "overlap", "this valid example is train.jsonl line 2 too"),
        ("test.jsonl", 1, "overlap", "this test example is valid.jsonl line 1 too"),
        ("test.jsonl", 2, "overlap", "this test example is train.jsonl line 1 too"),
    ]
    assert not report.ok


def test_repeats_are_those_of_a_slow_search():
    rng = random.Random(1)
    for _ in range(30):
        rows = [[rng.randrange(-9, 9) for _ in range(rng.randrange(25))] for _ in range(2)]
        splits = []
        for row in rows:
            prints, start = Fingerprints(), 0
            while start < len(row):
                piece = np.array(row[start : start + rng.randrange(1, 6)], np.int64)
                prints.add(0, start + 1 + np.arange(len(piece)), piece)
                start += len(piece)
            splits.append(prints)
        duplicates = [
            pair for later, first in find_duplicates(splits[0]) for pair in zip(later.tolist(), first.tolist())
        ]
        assert duplicates == [(i, rows[0].index(v)) for i, v in enumerate(rows[0]) if rows[0].index(v) < i]
        overlap = [pair for mine, others in find_overlap(*splits) for pair in zip(mine.tolist(), others.tolist())]
        assert overlap == [(i, rows[1].index(v)) for i, v in enumerate(rows[0]) if v in rows[1]]
        assert splits[0].places(np.arange(len(rows[0]))) == [(0, line) for line in range(1, len(rows[0]) + 1)]


def test_problems_are_counted_beyond_those_kept(write, monkeypatch):
    monkeypatch.setattr("mlx_afm.data.report.MAX_KEPT", 3)
    path = write("train.jsonl", *[b"{\n"] * 5, *[example(1)] * 9)
    report = check_data({"train": (path,)})
    assert report.counts == {"bad-json": 5, "duplicate": 8}
    assert [problem.line for problem in report.problems] == [1, 2, 3, 7, 8, 9]
    assert report.to_dict()["problems_left_out"] == 7


HOSTILE = {
    "empty": ("train.jsonl", b"", [(1, "no-examples")]),
    "blank": ("train.jsonl", b"\n \n\t\r\n", [(1, "no-examples")]),
    "truncated last line": ("train.jsonl", LINE + LINE[:30], [(2, "bad-json")]),
    "no line feed at the end": ("train.jsonl", LINE.strip(), []),
    "carriage returns": ("train.jsonl", LINE.replace(b"\n", b"\r\n"), []),
    "old Mac": ("train.jsonl", LINE.strip() + b"\r" + LINE.strip(), [(1, "bad-json")]),
    "byte order mark": ("train.jsonl", b"\xef\xbb\xbf" + LINE, [(1, "byte-order-mark")]),
    "two files put together": ("train.jsonl", LINE + b"\xef\xbb\xbf" + LINE, [(2, "byte-order-mark")]),
    "UTF-16": ("train.jsonl", TEXT.encode("utf-16"), [(1, "wrong-encoding")]),
    "UTF-16, big end first": ("train.jsonl", b"\xfe\xff" + TEXT.encode("utf-16-be"), [(1, "wrong-encoding")]),
    "UTF-32": ("train.jsonl", TEXT.encode("utf-32"), [(1, "wrong-encoding")]),
    "UTF-16, cut": ("train.jsonl", TEXT.encode("utf-16")[:-3], [(1, "wrong-encoding"), (1, "bad-json")]),
    "UTF-16, unmarked": ("train.jsonl", TEXT.encode("utf-16-le"), [(1, "nul"), (2, "nul")]),
    "Latin-1": ("train.jsonl", LINE + LINE.replace(b"hi", b"\xe9"), [(2, "not-utf8")]),
    "raw NUL": ("train.jsonl", LINE.replace(b"hi", b"\0"), [(1, "nul")]),
    "only NUL": ("train.jsonl", bytes(5000), [(1, "nul")]),
    "escaped NUL": ("train.jsonl", LINE.replace(b"hi", b"\\u0000"), [(1, "nul")]),
    "escaped NUL in arguments": (
        "train.jsonl",
        LINE.replace(b'"ho"', CALL.replace(b"ARGUMENTS", b'{\\"a\\": \\"\\\\u0000\\"}')),
        [(1, "nul")],
    ),
    "compressed": ("train.jsonl", gzip.compress(LINE, mtime=0), [(1, "not-utf8")]),
    "deep": ("train.jsonl", DEEP, [(1, "nested-too-deeply")]),
    "deep and open": ("train.jsonl", b'{"messages":' * 50_000, [(1, "nested-too-deeply")]),
    "deep in a message": ("train.jsonl", b'[{"role": "user", "content": ' + DEEP + b"}]", [(1, "nested-too-deeply")]),
    "deep in tools as text": (
        "train.jsonl",
        b'{"prompt": "a", "completion": "b", "tools": "' + DEEP + b'"}',
        [(1, "nested-too-deeply")],
    ),
    "deep in arguments": (
        "train.jsonl",
        LINE.replace(b'"ho"', CALL.replace(b"ARGUMENTS", DEEP)),
        [(1, "nested-too-deeply")],
    ),
    "huge integer": ("train.jsonl", b'{"messages": ' + b"7" * 100_000 + b"}", [(1, "bad-json")]),
    "infinite float": (
        "train.jsonl",
        b'{"prompt": "a", "completion": "b", "tools": [{"n": 1e999}]}',
        [(1, "wrong-tools")],
    ),
    "half a surrogate": ("train.jsonl", LINE.replace(b"ho", b"\\ud83d"), [(1, "half-surrogate")]),
    "half a surrogate as a key": ("train.jsonl", LINE.replace(b"}]", b', "\\ud83d": 1}]'), [(1, "unknown-key")]),
    "a key twice among many": (
        "train.jsonl",
        b'{"a": 1, ' + b", ".join(b'"%d": 1' % number for number in range(100_000)) + b', "99999": 2}',
        [(1, "duplicate-key")],
    ),
    "NaN": ("train.jsonl", b'{"messages": NaN}', [(1, "bad-json")]),
    "other values": ("train.jsonl", b"3\nnull\n\"x\"\ntrue\n", [(line, "unknown-form") for line in (1, 2, 3, 4)]),
    "an unknown suffix": ("train.txt", LINE + b"{", [(2, "bad-json")]),
    "array": ("train.json", b"[\n" + LINE + b"]", []),
    "array, empty": ("train.json", b"[]", [(1, "no-examples")]),
    "array, other values": ("train.json", b'[1, null,\n"x"]', [(line, "unknown-form") for line in (1, 2, 3)]),
    "array, comma at the end": ("train.json", b"[" + LINE + b",\n]", [(3, "bad-json")]),
    "array, no comma": ("train.json", b"[\n" + LINE + LINE + b"]", [(3, "bad-json")]),
    "array, cut": ("train.json", b"[\n" + LINE + b",\n" + LINE[:30], [(4, "bad-json")]),
    "array, never closed": ("train.json", b"[\n" + LINE, [(3, "bad-json")]),
    "array, more after it": ("train.json", b"[\n" + LINE + b"]\n[]", [(3, "bad-json")]),
    "array, deep": ("train.json", b"[\n" + LINE + b",\n" + DEEP, [(4, "nested-too-deeply")]),
    "array, huge integer": ("train.json", b"[\n" + b"7" * 5000 + b"]", [(2, "bad-json")]),
    "array, raw NUL": ("train.json", b"[\n" + LINE.replace(b"hi", b"\0") + b"]", [(2, "bad-json")]),
    "array, not UTF-8": ("train.json", b"[\n" + LINE + b",\n" + LINE.replace(b"hi", b"\xe9"), [(4, "not-utf8")]),
    "array, huge element": ("train.json", b"[\n" + LINE.replace(b"hi", b"x" * (5 << 20)) + b"]", [(2, "huge-line")]),
    "array, UTF-16": ("train.json", f"[{TEXT}]".encode("utf-16"), [(1, "wrong-encoding")]),
    "array, empty file": ("train.json", b"", [(1, "bad-json")]),
    "not an array": ("train.json", b'{"messages": []}', [(1, "bad-json")]),
    "table": ("train.csv", b"prompt,completion\na,b\n\n\"c\nd\",e\n", []),
    "table, wrong number of columns": (
        "train.csv",
        b"prompt,completion\na,b\na\n\na,b,c\n",
        [(3, "wrong-columns"), (5, "wrong-columns")],
    ),
    "table, broken quotes": ("train.csv", b'prompt,completion\na,b\n"c"d,e\nf,g\n', [(3, "bad-csv")]),
    "table, open quotes": ("train.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', [(3, "bad-csv")]),
    "table, huge field": ("train.csv", b"prompt,completion\na," + b"x" * (5 << 20), [(2, "bad-csv")]),
    "table, not UTF-8": ("train.csv", b"prompt,completion\na,b\n\xe9,d\n" + b"e,f\n" * 9000, [(3, "not-utf8")]),
    "table, raw NUL": ("train.csv", b"prompt,completion\na,b\nc\0,d\n", [(3, "nul")]),
    "table, a column twice": ("train.csv", b"prompt,prompt\na,b\n", [(1, "wrong-columns")]),
    "table, other columns": ("train.csv", b"q,a\nb,c\n", [(2, "unknown-form")]),
    "table, no records": ("train.csv", b"prompt,completion\n", [(1, "no-examples")]),
    "table, empty": ("train.csv", b"", [(1, "no-examples")]),
    "table, UTF-16": ("train.tsv", "prompt\tcompletion\na\tb\n".encode("utf-16"), [(1, "wrong-encoding")]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_a_report(name, write, tokenizer_file):
    file, data, expected = HOSTILE[name]
    path = write(file, data)
    for tokens in (None, tokenizer_file):
        report = check_data({"train": (path,)}, None, tokens)
        errors = [(p.line, p.kind) for p in report.problems if p.kind not in ("duplicate", "replacement-character")]
        assert errors == expected
    assert accepted_by_training(path, tokenizer_file) == (expected == [])


def accepted_by_training(path, tokenizer_file):
    try:
        read_tokens((path,), tokenizer_file)
    except DataError:
        return False
    return True


def test_a_line_of_50_mb(write):
    huge = json.dumps([{"role": "user", "content": "x" * 50_000_000}, GOOD[1]])
    for data in (LINE + huge.encode() + b"\n" + LINE, (TEXT + huge + "\n" + TEXT).encode("utf-16")):
        report = check_data({"train": (write("train.jsonl", data),)})
        (problem,) = [problem for problem in report.problems if problem.kind == "huge-line"]
        assert (problem.line, report.files[0].records) == (2, 3)
        assert "found 50,000," in problem.message


def test_what_cannot_be_read_does_not_hide_the_rest(tmp_path, write):
    good = write("valid.jsonl", GOOD)
    (tmp_path / "train.jsonl").mkdir()
    (tmp_path / "test.jsonl").symlink_to(tmp_path / "gone")
    report = check_data(find_splits(tmp_path))
    assert [(p.line, p.kind, p.message.split(" (")[0]) for p in report.problems] == [
        (1, "unreadable-file", "not a file"),
        (1, "unreadable-file", "no such file"),
    ]
    assert [(file.file, file.examples) for file in report.files][1] == (str(good), 1)
    with pytest.raises(FormatError):
        read_tokens(find_splits(tmp_path)["train"], Path("unused"))


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    assert found(check_data(find_splits(tmp_path))) == [("train.jsonl", 1, "unreadable-file")]


def test_files_one_may_not_read(write, monkeypatch):
    path = write("train.jsonl", GOOD)

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    (problem,) = check_data({"train": (path,)}).problems
    assert (problem.kind, problem.message) == ("unreadable-file", "cannot be read: Permission denied")


def test_long_messages_are_cut_and_can_be_printed(write):
    path = write("train.jsonl", [{**GOOD[0], "k" * 100_000: 1}, GOOD[1]], [{**GOOD[0], "\ud800": 1}, GOOD[1]])
    cut, printable = (problem.message for problem in check_data({"train": (path,)}).problems)
    assert len(cut) < 1100
    assert "\\ud800" in printable
    printable.encode()


def test_records_are_numbered_within_their_split(write, tmp_path, monkeypatch):
    (tmp_path / "numbering.py").write_text(
        "def refuse(messages, index):\n"
        "    if index != int(messages[0]['content'].split()[1]):\n"
        "        raise ValueError(index)\n"
        "    return messages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    splits = {
        "train": (write("a.jsonl", example(0), example(1)), write("b.jsonl", example(2))),
        "valid": (write("valid.jsonl", example(0), example(7)),),
    }
    report = check_data({**splits, "test": ()}, DataConfig(transform="numbering:refuse"))
    assert [kind for kind in found(report) if kind[2] == "transform-failed"] == [("valid.jsonl", 2, "transform-failed")]


def test_what_ends_a_check(tmp_path, write):
    with pytest.raises(ConfigError, match="no such transform"):
        check_data({"train": (write("train.jsonl", GOOD),)}, DataConfig(transform="nowhere:nothing"))
    with pytest.raises(FormatError, match="no training data"):
        check_data({})


def test_progress_is_told(write):
    seen = []
    path = write("train.jsonl", *[example(number) for number in range(9000)])
    check_data({"train": (path,)}, workers=1, on_progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [path.stat().st_size] * len(seen)
    assert len(seen) >= 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (path.stat().st_size,) * 2
    check_data({"train": (write("empty.jsonl", b""),)}, on_progress=lambda done, total: pytest.fail("nothing to tell"))


def test_tldr(tldr_train, tokenizer_file):
    report = check_data({"train": (tldr_train,)}, None, tokenizer_file)
    assert report.ok
    assert report.counts == {"duplicate": 86, "newline-mark": 11, "unknown-token": 11}
    assert [(file.records, file.examples) for file in report.files] == [(28_726, 28_726)]


def test_every_kind_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = {kind for cell in first_cells for kind in re.findall(r"`([a-z0-9-]+)`", cell)}
    warnings = {re.search(r"`([a-z0-9-]+)`", cell).group(1) for cell in first_cells if "(warning)" in cell}
    kinds = {kind for kind, _ in FAULTS} | {kind for _, _, problems in HOSTILE.values() for _, kind in problems}
    assert kinds <= documented
    assert warnings == set(WARNINGS)
