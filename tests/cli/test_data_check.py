"""`mlx-afm data check`: its report for people and programs, its exit codes, its options."""

import json

import pytest

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
LONG = [GOOD[0], {"role": "assistant", "content": "ho " * 300}]


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder of splits."""

    def write(**splits):
        (tmp_path / "data").mkdir(exist_ok=True)
        for split, lines in splits.items():
            rows = [row if isinstance(row, str) else json.dumps(row) for row in lines]
            (tmp_path / "data" / f"{split}.jsonl").write_text("".join(row + "\n" for row in rows))
        return tmp_path / "data"

    return write


def report_of(ran):
    (text,) = ran.out.splitlines()
    return json.loads(text)


def test_good_data(cli, folder, model_folder):
    data = folder(train=[GOOD], test=[[*GOOD, *LONG]])
    ran = cli("data", "check", data, "--model", model_folder)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.split(" (")[0] for line in lines[:2]] == [str(data / "train.jsonl"), str(data / "test.jsonl")]
    assert "(train): 1 records, 1 examples, " in lines[0]
    assert lines[2:] == ["0 errors, 0 warnings: ready for training"]
    assert "not checked" not in ran.err


def test_json_is_what_other_programs_rely_on(cli, folder):
    data = folder(train=[GOOD, "{", GOOD], valid=[GOOD])
    ran = cli("data", "check", data, "--json")
    assert ran.code == 3
    report = report_of(ran)
    assert [(p["file"], p["line"], p["kind"], p["column"], p["severity"]) for p in report["problems"]] == [
        (str(data / "train.jsonl"), 2, "bad-json", 2, "error"),
        (str(data / "train.jsonl"), 3, "duplicate", None, "warning"),
        (str(data / "valid.jsonl"), 1, "overlap", None, "error"),
    ]
    assert all(problem["message"] for problem in report["problems"])
    assert report["counts"] == {"bad-json": 1, "duplicate": 1, "overlap": 1}
    expected = {"ok": False, "errors": 2, "warnings": 1, "records": 4, "examples": 3, "lengths_checked": False}
    assert {name: report[name] for name in expected} == expected
    assert [(file["split"], file["records"], file["examples"]) for file in report["files"]] == [
        ("train", 3, 2),
        ("valid", 1, 1),
    ]
    assert "Lengths were not checked" in ran.err


def test_people_read_problems_by_kind_errors_first(cli, folder):
    data = folder(train=[GOOD, "{", GOOD, "[]", *["{"] * 30])
    ran = cli("data", "check", data)
    assert ran.code == 3
    lines = ran.out.splitlines()
    assert lines[0] == "ERROR bad-json: 31"
    assert lines[1] == ("  train.jsonl line 2, column 2: not JSON: Expecting property name enclosed in double quotes")
    assert lines[21:] == [
        "  ... and 11 more; --json lists 31",
        "ERROR no-messages: 1",
        "  train.jsonl line 4: no user or assistant message (found 0 messages)",
        "WARNING duplicate: 1",
        "  train.jsonl line 3: the same example as line 1: it counts twice",
        f"{data / 'train.jsonl'} (train): 34 records, 2 examples",
        "32 errors, 1 warnings: training would be wrong",
    ]


def test_warnings_alone_do_not_fail(cli, folder):
    ran = cli("data", "check", folder(train=[GOOD, GOOD]))
    assert ran.code == 0
    assert ran.out.endswith("0 errors, 1 warnings: ready for training\n")


def test_lengths_and_truncation(cli, folder, model_folder):
    data = folder(train=[GOOD, LONG])
    arguments = ("data", "check", "--data", data, "--model", model_folder, "--max-seq-length", 100)
    refused = cli(*arguments)
    assert refused.code == 3
    assert "ERROR too-long: 1" in refused.out
    dropped = cli(*arguments, "--truncation", "drop")
    assert dropped.code == 0
    assert "  too long: 1 left out, 0 cut, " in dropped.out


def test_options_reach_the_reader(cli, folder, tmp_path, monkeypatch):
    data = folder(train=[{"q": "a", "a": "b"}])
    assert cli("data", "check", data).code == 3
    assert cli("data", "check", data, "--field", "prompt=q", "--field", "completion=a").code == 0
    assert cli("data", "check", data, "--field", "prompt=q", "--data-format", "prompt-response").code == 3
    (tmp_path / "hooks_of_check.py").write_text(
        "def upper(messages, index):\n    return [{**m, 'content': ''} for m in messages]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ran = cli("data", "check", folder(train=[GOOD]), "--transform", "hooks_of_check:upper", "--json")
    assert report_of(ran)["counts"] == {"empty-answer": 1}
    tools = {"messages": GOOD, "tools": [{"name": "look"}]}
    assert cli("data", "check", folder(train=[tools])).code == 0
    ran = cli("data", "check", folder(train=[tools]), "--system-prompt", "", "--json")
    assert report_of(ran)["counts"] == {"wrong-tools": 1}


def test_fix_writes_a_copy_and_says_what_changed(cli, folder, tmp_path):
    data = folder(train=[GOOD, "{", GOOD, LONG], valid=[LONG])
    ran = cli("data", "check", data, "--fix", tmp_path / "fixed")
    assert ran.code == 3
    lines = ran.out.splitlines()
    assert lines[-4:] == [
        f"{tmp_path / 'fixed'}: train.jsonl, valid.jsonl written; what changed:",
        "  train.jsonl line 2: left out: bad-json",
        "  train.jsonl line 3: left out: the same example stands before it",
        "  train.jsonl line 4: left out: a held-out split has this example too, and keeps it",
    ]
    assert cli("data", "check", tmp_path / "fixed").code == 0
    again = report_of(cli("data", "check", tmp_path / "fixed", "--fix", tmp_path / "again", "--json"))
    assert again["fix"] == {
        "folder": str(tmp_path / "again"),
        "files": [str(tmp_path / "again" / f"{split}.jsonl") for split in ("train", "valid")],
        "counts": {},
        "changes": [],
    }
    assert "  nothing" in cli("data", "check", tmp_path / "fixed", "--fix", tmp_path / "more").out


def test_what_is_refused(expect_refusal, cli, folder, tmp_path, model_folder):
    data = folder(train=[GOOD])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    check = ("data", "check")
    expect_refusal(*check, tmp_path / "gone", says=["gone", "no such file or folder"])
    expect_refusal(*check, tmp_path / "other", says=["no training data", "train.jsonl", "found notes.txt"])
    expect_refusal(*check, data, "--fix", data, says=[data, "exists"])
    expect_refusal(*check, data, "--model", tmp_path / "other", says=["the model folder has no tokenizer"])
    expect_refusal(*check, data, "--model", tmp_path / "gone", says=["no such folder"])
    expect_refusal(*check, data, "--max-seq-length", 1, says=["max_tokens: expected at least 2, found 1"], code=2)
    expect_refusal(*check, data, "--transform", "gone:f", says=["no such transform"], code=2)
    folder(train=["{"])
    expect_refusal(*check, data, "--fix", tmp_path / "fixed", says=["no example would be left"])
    for wrong in ((), (data, "--data", data), (data, "--field", "prompt"), (data, "--truncation", "x")):
        assert cli(*check, *wrong).code == 2


def test_text_that_no_terminal_can_show(cli, folder):
    ran = cli("data", "check", folder(train=[[{**GOOD[0], "\ud800": 1}, GOOD[1]]]))
    assert ran.code == 3
    assert "unknown keys for role 'user': \\ud800" in ran.out
