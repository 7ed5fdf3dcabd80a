"""`mlx-afm data stats`, `render`, `split`, `convert`: what they print, and that they refuse whole."""

import json
import re

import pytest

from mlx_afm_cli.data_render_command import _visible


def chat(ask, say):
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]


@pytest.fixture
def folder(tmp_path):
    """A folder of a train and a valid split."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 12), ("valid", 3)):
        lines = (json.dumps(chat(f"{split} {'long ' * i}", f"say\n{i}")) for i in range(count))
        (data / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return data


def test_stats(cli, folder, model_folder):
    told = cli("data", "stats", folder, "--model", model_folder, "--json").json
    assert list(told["splits"]) == ["train", "valid"]
    train = told["splits"]["train"]
    assert (train["examples"], train["limit"], train["longer"]) == (12, 4096, 0)
    assert train["trained_share"] == train["trained_tokens"] / train["tokens"]
    assert sum(bar["examples"] for bar in train["histogram"]) == 12
    assert train["longest_examples"][0] == {
        "file": str(folder / "train.jsonl"),
        "line": 12,
        "tokens": train["longest"],
    }
    ran = cli("data", "stats", "--data", folder, "--model", model_folder, "--max-seq-length", 50)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == f"train: 12 examples, {train['tokens']:,} tokens"
    assert re.fullmatch(rf"  trained +{train['trained_tokens']:,} +[\d.]+%", lines[1])
    for words in ("longer than the limit of 50", "  longest: train.jsonl line 12 (", "  batches of 4: ", " of 50"):
        assert words in ran.out
    bars = [line for line in lines if re.match(r" +[\d,]+-[\d,]+ +#", line)]
    assert max(line.count("#") for line in bars) == 40
    assert "\nvalid: 3 examples" in ran.out
    assert "\x1b" not in ran.out


def test_stats_of_faulty_data(cli, folder, model_folder, expect_refusal):
    (folder / "train.jsonl").write_text(json.dumps(chat("a", "b")) + "\n{\n")
    ran = cli("data", "stats", folder / "train.jsonl", "--model", model_folder)
    assert "1 examples" in ran.out
    assert "1 faulty lines left out, see data check" in ran.out
    (folder / "train.jsonl").write_text("{\n")
    expect_refusal("data", "stats", folder, "--model", model_folder, says=["no examples", "1 faulty line"])
    assert cli("data", "stats", folder).code == 2


def test_render(cli, folder, model_folder):
    ran = cli("data", "render", folder, "--model", model_folder, "-n", 2)
    assert ran.code == 0
    blocks = ran.out.split("--- ")[1:]
    assert len(blocks) == 2
    first = blocks[0].splitlines()
    assert re.fullmatch(rf"{re.escape(str(folder / 'train.jsonl'))} line 1: \d+ tokens, \d+ trained", first[0])
    assert first[1] == "</s><turn_start> system"
    assert first[-4:] == ["train <turn_end><turn_start> assistant", "«say", "0<turn_end>»", ""]


def test_render_for_programs(cli, folder, model_folder):
    options = ("--model", model_folder, "--split", "valid", "--line", 2, "--ids", "--json")
    (example,) = cli("data", "render", folder, *options).json["examples"]
    assert (example["line"], example["data_format"]) == (2, "toolkit")
    assert [part["trained"] for part in example["texts"]] == [False, True]
    assert example["texts"][1]["text"] == "say\n1<turn_end>"
    assert example["tokens"] == len(example["ids"])
    assert example["ids"][-1]["piece"] == "<turn_end>"
    chosen = []
    for seed in (1, 1, 2, 3):
        told = cli("data", "render", folder, *options[:2], "--seed", seed, "--json").json
        chosen.append([example["line"] for example in told["examples"]])
    assert chosen[0] == chosen[1]
    assert len({tuple(lines) for lines in chosen}) > 1


def test_render_ids_and_colours(cli, folder, model_folder, monkeypatch):
    shown = ("data", "render", folder, "--model", model_folder, "-n", 1, "--ids")
    plain = cli(*shown).out
    assert re.search(r"^ +\d+  <turn_start>$", plain, re.MULTILINE)
    assert re.search(r"^« +\d+  <turn_end>»$", plain, re.MULTILINE)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("mlx_afm_cli.data_render_command._on_terminal", lambda: True)
    coloured = cli(*shown).out
    assert "«" not in coloured
    assert "\x1b[32m\x1b[1msay\n0<turn_end>\x1b[0m" in coloured


def test_what_data_holds_does_not_steer_the_terminal():
    assert _visible("a\x1b[31mred\x07\r\n\tnaïve\u202e") == "a\\x1b[31mred\\x07\\r\n\tnaïve\\u202e"


def test_render_refusals(folder, model_folder, expect_refusal):
    def refuse(*options, says, code=1):
        expect_refusal("data", "render", folder, "--model", model_folder, *options, says=says, code=code)

    refuse("--line", 99, says=["no example in line 99"])
    refuse("--split", "test", says=["no test split", "expected test.jsonl (or .json", "found train.jsonl, valid.jsonl"])
    refuse("--line", 1, "--seed", 1, says=["two ways to choose"], code=2)
    refuse("--max-seq-length", 10, says=["train.jsonl line 1: too long"])


def test_split(cli, folder, tmp_path):
    words = ["stone", "river", "cloud", "paper", "window", "garden", "silver", "table", "music", "winter"]
    lines = [json.dumps(chat(f"{one} {other} {one}", "x")) for one in words for other in words]
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    told = cli("data", "split", source, "--out", out, "--valid", 0.1, "--test", 0.2, "--seed", 3, "--json").json
    assert told["examples"] == {"train": 70, "valid": 10, "test": 20}
    assert told["files"] == {side: str(out / f"{side}.jsonl") for side in ("train", "valid", "test")}
    written = [(out / f"{side}.jsonl").read_text().splitlines() for side in ("train", "valid", "test")]
    assert sorted(line for lines_of_side in written for line in lines_of_side) == sorted(lines)
    assert "groups" in cli("data", "split", source, "--out", tmp_path / "again").out


def test_split_refusals(folder, tmp_path, expect_refusal):
    expect_refusal("data", "split", folder, "--out", tmp_path / "o", says=["the data is split already", "train, valid"])
    one = folder / "train.jsonl"
    expect_refusal("data", "split", one, "--out", folder, says=["would replace its source"])
    expect_refusal(
        "data", "split", one, "--out", tmp_path / "o", "--valid", 2, says=["out of range", "valid: expected"], code=2
    )


def test_convert(cli, folder, tmp_path):
    target = tmp_path / "out.csv"
    told = cli("data", "convert", folder / "valid.jsonl", target, "--to", "prompt-response", "--json").json
    assert told == {"data_format": "prompt-response", "records": 3, "files": {str(target): 3}}
    assert target.read_text().splitlines()[:2] == ['"prompt","response"', '"valid ","say']


def test_text_pairs_in_one_command(cli, tmp_path):
    (tmp_path / "pairs.tsv").write_text("one\ttwo\nthree\tfour\n")
    cli("data", "convert", tmp_path / "pairs.tsv", tmp_path / "train.jsonl", "--columns", "prompt, completion")
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert records == [{"messages": chat("one", "two")}, {"messages": chat("three", "four")}]


def test_convert_a_folder(cli, folder, tmp_path):
    told = cli("data", "convert", folder, tmp_path / "out", "--to", "sharegpt", "--json").json
    assert told["files"] == {str(tmp_path / "out" / "train.jsonl"): 12, str(tmp_path / "out" / "valid.jsonl"): 3}
    record = json.loads((tmp_path / "out" / "valid.jsonl").read_text().splitlines()[1])
    assert record["conversations"][1] == {"from": "gpt", "value": "say\n1"}


def test_convert_refusals(folder, tmp_path, expect_refusal):
    (folder / "valid.jsonl").write_text(json.dumps({"text": "plain"}) + "\n")
    says = ["valid.jsonl line 1: the data format sharegpt cannot say this", "Nothing was written"]
    expect_refusal("data", "convert", folder, tmp_path / "out", "--to", "sharegpt", says=says)
    expect_refusal("data", "convert", folder, folder, says=["the target exists already"])
    expect_refusal("data", "convert", tmp_path / "none", tmp_path / "out", says=["no such file or folder"])
    expect_refusal(
        "data",
        "convert",
        folder,
        tmp_path / "o",
        "--field",
        "prompt=b",
        "--transform",
        "x:y",
        says=["transform"],
        code=2,
    )
