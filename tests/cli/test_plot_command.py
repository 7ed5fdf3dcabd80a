import json


def metrics(folder):
    events = [{"event": "train", "step": 1, "loss": 2.0}, {"event": "eval", "step": 0, "loss": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_plot_in_the_terminal_and_in_a_file(tmp_path, cli):
    ran = cli("plot", metrics(tmp_path), "--output", tmp_path / "loss.svg")
    assert ran.code == 0
    assert "* training: 2.0000 at step 1" in ran.out
    assert "o validation: 3.0000 at step 0" in ran.out
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")
    assert "drawn into" in ran.err


def test_as_json(tmp_path, cli):
    told = cli("plot", metrics(tmp_path), "--json").json
    assert told == {"curves": {"training": [[1, 2.0]], "validation": [[0, 3.0]]}, "output": None}


def test_what_is_no_run(tmp_path, expect_refusal):
    expect_refusal("plot", tmp_path, says=[tmp_path / "metrics.jsonl", "no such file", "metrics.jsonl of a run"])
