"""`mlx-afm draft`: trains, measures, and refuses what makes no sense."""

import json

import pytest

from mlx_afm.workflows.draft import new_draft


@pytest.fixture(scope="module")
def start(model_folder, tmp_path_factory):
    return new_draft(tmp_path_factory.mktemp("draft") / "start", model_folder, layers=2, width=32, heads=2)


def test_the_command(cli, start, model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_AFM_CACHE", str(tmp_path / "cache"))
    base = ["draft", "--model", model_folder, "--data", data_folder]
    line = [*base, "--draft-model", start, "--output", tmp_path / "out", "--epochs", 4, "--learning-rate", "0.01"]
    told = cli(*line, "--json").json
    assert told["after"]["sampled"] > told["before"]["sampled"]
    assert told["draft_model"] == str(tmp_path / "out" / "model")
    ran = cli(*base, "--test", "--draft-model", told["draft_model"])
    assert "acceptance" in ran.out
    assert "proposals  tokens a pass (greedy)" in ran.out
    measured = cli(*base, "--test", "--draft-model", told["draft_model"], "--json").json
    assert measured["sampled"] == pytest.approx(told["after"]["sampled"], rel=1e-6)
    answered = cli(
        "generate", "--model", model_folder, "--draft-model", told["draft_model"], "--prompt", "list files", "-m", 8
    )
    assert answered.code == 0
    new = cli(*base, "--init", "tiny", "--output", tmp_path / "new", "--iters", 2, "--json")
    assert new.code == 0
    assert json.loads((tmp_path / "new" / "start" / "config.json").read_text())["num_layers"] == 4
    for more in (["--iters", 0], ["--data", tmp_path / "nowhere"]):
        assert cli(*base, "--init", "tiny", "--output", tmp_path / "none", *more).code in (1, 2)
        assert not (tmp_path / "none").exists()
    for wrong, message in (
        (base, "missing --output, --draft-model or --init"),
        ([*base, "--test", "--draft-model", start, "--iters", 3], "--iters: no effect with --test"),
        ([*line, "--init", "small"], "--init: no effect"),
        ([*base, "--test", "--draft-model", start, "--output", "x"], "--output: no effect with --test"),
    ):
        ran = cli(*wrong)
        assert ran.code == 2
        assert message in ran.err
