"""Which files of a folder are read, what is said of the others, and what commands write or replace."""

import json
import stat

import pytest

import mlx_afm

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
NAMES = {
    "train": ("train", "training_data"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}


def conversation(text):
    return {"messages": [{**USER, "content": text}, ANSWER]}


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of the folder `data`: texts as they are, other values as one record."""

    def write_file(name, content):
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content) + "\n"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def trained(cli, model_folder, tmp_path):
    """A function that trains one step on a folder; what it printed on stderr, and its events."""

    def train(data, *options, code=0):
        path = tmp_path / "adapter"
        ran = cli("lora", "--train", "--model", model_folder, "--data", data, "--adapter-path", path, "--iters", 1,
                  "--rank", 2, "--no-cache", *options)  # fmt: skip
        assert ran.code == code, ran.err
        if code:
            return ran.err, []
        return ran.err, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    return train


def checked(ran):
    (line,) = ran.out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in NAMES.items() for name in names])
def test_usual_names_of_splits(split, name, write, cli):
    path = write(f"{name}.jsonl", conversation("x"))
    report = cli("data", "check", path.parent, "--json").json
    assert [(file["file"], file["split"]) for file in report["files"]] == [(str(path), split)]
    assert report["unread_files"] == []


def test_the_names_of_the_toolkit_are_read_by_training(write, trained):
    write("training_data.jsonl", conversation("x"))
    data = write("eval.jsonl", conversation("y")).parent
    told, events = trained(data)
    assert "not read" not in told
    assert any(event["event"] == "eval" for event in events)


def test_check_and_training_name_what_they_do_not_read(write, trained, cli):
    data = write("train.jsonl", conversation("x")).parent
    for name in ("extra.jsonl", "holdout.csv", "train.jsonl.gz", "README.md", ".train.jsonl.swp", "dataset_info.json"):
        write(name, "{}")
    unread = ["extra.jsonl", "holdout.csv", "train.jsonl.gz"]
    told, _ = trained(data)
    ran = cli("data", "check", data, "--json")
    assert checked(ran)["unread_files"] == [str(data / name) for name in unread]
    for text in (told, ran.err):
        (line,) = [line for line in text.splitlines() if "not read: " in line]
        assert f"not read: {', '.join(unread)} (the name of a file of data is one of train, training_data, " in line


def test_no_split_at_all_is_told_with_what_lies_there(write, expect_refusal, trained):
    data = write("trian.jsonl", conversation("x")).parent
    write("._train.jsonl", "\0\5\26\7")
    says = [
        f"{data}: no training data in this folder",
        "expected train.jsonl or training_data.jsonl",
        "found trian.jsonl)",
    ]
    expect_refusal("data", "check", data, says=says)
    told, _ = trained(data, code=1)
    assert f"{data}: no train split" in told
    assert "found trian.jsonl)" in told


def test_hidden_files_are_skipped(write, cli, trained):
    data = write("train.jsonl", conversation("x")).parent
    for name in ("._train.jsonl", "._valid.jsonl", ".DS_Store", ".hidden.jsonl"):
        write(name, "\0\5\26\7")
    assert cli("data", "check", data, "--json").json["counts"] == {}
    assert trained(data)[0].count("not read") == 0
    assert cli("inspect", data, "--json").json["lines"] == {"train.jsonl": 1}


def test_two_names_of_one_split_are_refused(write, expect_refusal):
    data = write("valid.jsonl", conversation("x")).parent
    write("eval.jsonl", conversation("y"))
    expect_refusal("data", "check", data, says=["more than one valid split", "valid.jsonl, eval.jsonl"])


WARNED = {
    "unknown-token": ([USER, {**ANSWER, "content": "漢字 漢"}], ["no piece for '漢' (2), '字' (1): ", "<unk>"]),
    "arguments-not-json": (
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "look", "arguments": "{'a': 1}"}}]}],
        ["message 1: the arguments of 'look' are not a JSON object", "{'a': 1}"],
    ),
    "other-template": (
        [{**USER, "content": "<|user|>hi<|end|> <|user|>"}, {**ANSWER, "content": "[INST] ho"}],
        ["'<|user|>' (2), '<|end|>' (1), '[INST]' (1)"],
    ),
}


@pytest.mark.parametrize("kind", WARNED)
@pytest.mark.parametrize("form", ["messages", "text"])
def test_oddities_are_warned_of_with_counts(kind, form, write, cli, model_folder):
    messages, says = WARNED[kind]
    if form == "text" and kind == "arguments-not-json":
        pytest.skip("plain text has no tool calls")
    text = {"text": "".join(message["content"] for message in messages)}
    records = [text if form == "text" else {"messages": messages}, conversation("good")]
    path = write("train.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    report = cli("data", "check", path, "--model", model_folder, "--json").json
    assert (report["ok"], report["counts"]) == (True, {kind: 1})
    (problem,) = report["problems"]
    assert (problem["line"], problem["severity"]) == (1, "warning")
    assert all(part in problem["message"] for part in says)
    assert f"WARNING {kind}: 1" in cli("data", "check", path, "--model", model_folder).out


def test_every_line_with_a_mark_of_another_template_counts(write, cli):
    lines = [conversation(f"{number} <|im_start|>") for number in range(30)] + [conversation("plain")]
    path = write("train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert cli("data", "check", path, "--json").json["counts"] == {"other-template": 30}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", json.dumps(conversation("x"), indent=2), ["a record over several lines", "jq -c ."]),
        ("a.jsonl", f"\n{json.dumps([conversation('x')], indent=1)}", ["array", "Name the file .json"]),
        ("a.jsonl", f"[\n{json.dumps(conversation('x'))}\n]\n", ["a JSON array over several lines"]),
        ("a.jsonl", '{ "messages": [\n  { "role": "user",\n "content": "x" } ] }', ["a record over several lines"]),
        ("a.jsonl", json.dumps([conversation("x"), conversation("y")]), ["several records in one", "a list of 2"]),
        ("a.csv", "prompt;completion\na;b\n", ["found a semicolon", "a comma in a .csv file"]),
        ("a.csv", '"prompt";"completion"\n"a";"b, c"\n', ["found a semicolon"]),
        ("a.csv", "prompt\tcompletion\na\tb\n", ["found a tab"]),
        ("a.tsv", "prompt,completion\na,b\n", ["found a comma", "a tab in a .tsv file"]),
    ],
)  # fmt: skip
def test_another_form_than_the_name_says_is_one_fault(name, text, says, write, cli, model_folder):
    path = write(name, text)
    ran = cli("data", "check", path, "--json")
    (problem,) = checked(ran)["problems"]
    assert ran.code == 3
    assert all(part in problem["message"] for part in says)
    told = cli("lora", "--train", "--model", model_folder, "--data", path, "--adapter-path", path.with_name("adapter"))
    assert told.code == 1
    assert all(part in told.err for part in says)


def test_a_damaged_first_line_does_not_hide_the_others(write, cli):
    path = write("train.jsonl", '{"messages": [\n' + json.dumps(conversation("x")) + "\n")
    ran = cli("data", "check", path, "--json")
    assert [(problem["line"], problem["kind"]) for problem in checked(ran)["problems"]] == [(1, "bad-json")]
    assert checked(ran)["examples"] == 1


def test_a_table_of_one_column_may_hold_semicolons(write, cli):
    assert cli("data", "check", write("a.csv", "text\none; two\n"), "--json").json["examples"] == 1


@pytest.fixture
def source(write):
    """A file of 40 different conversations."""
    words = ["ash", "bay", "cat", "dog", "elm", "fox", "gnu", "hen", "ivy", "jay"]
    lines = [conversation(f"{one} {two} {one}{two}") for one in words for two in words[:4]]
    return write("all.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def test_split_replaces_files_only_when_told(source, tmp_path, cli, expect_refusal):
    out = tmp_path / "out"
    split = ("data", "split", source, "--out", out, "--valid", 0.2, "--test", 0.2, "--threshold", 1)
    assert cli(*split, "--json").code == 0
    first = (out / "train.jsonl").read_bytes()
    expect_refusal(*split, "--seed", 1, says=[out, "train.jsonl, valid.jsonl, test.jsonl", "--overwrite"])
    assert cli(*split, "--seed", 1, "--overwrite", "--json").code == 0
    assert (out / "train.jsonl").read_bytes() != first
    # A split that would stay beside the new ones is refused even so.
    says = ["other splits in this folder", "found test.jsonl", "Remove them"]
    expect_refusal(*split[:-4], "--test", 0, "--threshold", 1, "--overwrite", says=says)


def test_split_does_not_write_beside_another_form_of_a_split(source, tmp_path, expect_refusal):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.csv").write_text("prompt,completion\na,b\n")
    split = ("data", "split", source, "--out", tmp_path / "out", "--threshold", 1)
    expect_refusal(*split, says=["found eval.csv"])
    expect_refusal(*split, "--overwrite", says=["other splits in this folder", "found eval.csv"])


def test_convert_replaces_a_file_only_when_told(source, tmp_path, cli, expect_refusal):
    target = tmp_path / "b.jsonl"
    target.write_text("mine")
    expect_refusal("data", "convert", source, target, says=[target, "the file exists", "--overwrite"])
    assert cli("data", "convert", source, target, "--overwrite", "--json").json["records"] == 40
    expect_refusal("data", "convert", source, source, "--overwrite", says=["would replace its source"])


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder of the test."""
    monkeypatch.delenv("MLX_AFM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


LORA = ("lora", "--train", "--iters", 1, "--rank", 2)


def lora(write, model_folder, tmp_path, *options):
    data = write("train.jsonl", conversation("x"))
    return (*LORA, "--model", model_folder, "--data", data, "--adapter-path", tmp_path / "adapter", *options)


def test_the_cache_of_encoded_data_is_private(write, model_folder, tmp_path, home, cli):
    entries = home / "mlx-afm" / "tokens"
    entries.mkdir(parents=True)  # as earlier releases left it: open to all
    assert cli(*lora(write, model_folder, tmp_path)).code == 0
    (entry,) = entries.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (entries, entry)] == [0o700, 0o700]


@pytest.mark.parametrize("way", ["--no-cache", "MLX_AFM_CACHE=off"])
def test_the_cache_can_be_turned_off(way, write, model_folder, tmp_path, home, cli, monkeypatch):
    if way == "MLX_AFM_CACHE=off":
        monkeypatch.setenv(*way.split("="))
        monkeypatch.chdir(tmp_path)
    assert cli(*lora(write, model_folder, tmp_path, *([way] if way.startswith("--") else []))).code == 0
    assert not home.exists()
    assert not (tmp_path / "off").exists()
    if "=" in way:
        assert mlx_afm.LoRAJob(model=model_folder, data=tmp_path, adapter_path=tmp_path).cache is None
