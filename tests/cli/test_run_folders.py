"""The folder of a training run: what replaces it, who may write it, and which of its adapters is used."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import mlx_afm
from mlx_afm.errors import ConfigError

SHORT = ("--iters", 4, "--batch-size", 4, "--steps-per-eval", 1, "--seed", 5)
WORSE = ("--learning-rate", 0.1, "--warmup", 4, "--schedule", "constant")  # ends worse than it was


@pytest.fixture(scope="module")
def finished(model_folder, data_folder, tmp_path_factory):
    """A finished run whose best adapter is not its last one, and what `--json` said of it."""
    from click.testing import CliRunner

    from mlx_afm_cli.main import group

    folder = tmp_path_factory.mktemp("run") / "adapter"
    line = ["lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", folder]
    ran = CliRunner().invoke(group, [*map(str, (*line, *SHORT, *WORSE)), "--json"], standalone_mode=False)
    return folder, json.loads(ran.stdout), ran.stderr


@pytest.fixture
def run(finished, copy_of):
    """The finished run, to be changed."""
    return copy_of(finished[0])


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- both adapters, each with its loss ----


def test_the_summary_names_the_last_and_the_best_adapter(finished, model_folder, data_folder, cli):
    folder, told, err = finished
    assert told["adapter_path"] == str(folder)
    assert told["best_adapter_path"] == str(folder / "best")
    assert told["best_step"] < told["steps"] == 4
    for path, name in ((folder, "last_valid_loss"), (folder / "best", "best_valid_loss")):
        scored = cli("lora", "--test", "--model", model_folder, "--data", data_folder / "valid.jsonl",
                     "--adapter-path", path, "--json").json  # fmt: skip
        assert scored["test_loss"] == pytest.approx(told[name], rel=1e-5)
    assert f"to use the best: mlx-afm fuse --model {model_folder} --adapter-path {folder} --best" in err


def test_the_line_of_the_summary_fuses_the_best_adapter(finished, model_folder, tmp_path, cli):
    folder, _, err = finished
    (line,) = [line for line in err.splitlines() if line.startswith("to use the best: ")]
    arguments = line.removeprefix("to use the best: mlx-afm ").partition(";")[0].split()
    assert cli(*arguments, "--save-path", tmp_path / "by-line").code == 0
    assert cli("fuse", "--model", model_folder, "--adapter-path", folder / "best", "--save-path",
               tmp_path / "by-path").code == 0  # fmt: skip
    assert cli("fuse", "--model", model_folder, "--adapter-path", folder, "--save-path", tmp_path / "last").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("by-line", "by-path", "last")]
    assert weights[0] == weights[1] != weights[2]


def test_test_and_export_take_the_best_adapter(finished, model_folder, data_folder, tmp_path, cli):
    folder, told, _ = finished
    line = ("lora", "--test", "--model", model_folder, "--data", data_folder / "valid.jsonl", "--json")
    scored = cli(*line, "--adapter-path", folder, "--best").json
    assert scored["test_loss"] == pytest.approx(told["best_valid_loss"], rel=1e-5)
    assert scored["tested_adapter"] == str(folder / "best")
    packages = []
    for name, arguments in (("a", (folder, "--best")), ("b", (folder / "best",)), ("c", (folder,))):
        place = tmp_path / name
        assert cli("export", "--name", "x", "--output-dir", place, "--adapter-path", *arguments).code == 0
        packages.append((place / "x.fmadapter" / "adapter_weights.bin").read_bytes())
    assert packages[0] == packages[1] != packages[2]


def test_best_without_a_best_adapter_is_refused(run, model_folder, data_folder, tmp_path, cli):
    shutil.rmtree(run / "best")
    for line in (
        ("lora", "--test", "--model", model_folder, "--data", data_folder),
        ("fuse", "--model", model_folder, "--save-path", tmp_path / "f"),
        ("export", "--name", "x", "--output-dir", tmp_path / "out"),
    ):
        ran = cli(*line, "--adapter-path", run, "--best")
        assert ran.code == 1
        assert f"{run}: no best adapter here (expected best/adapters.safetensors)" in ran.err
    ran = cli("lora", "--train", "--test", "--best", "--model", model_folder, "--data", data_folder / "train.jsonl",
              "--adapter-path", tmp_path / "new", *SHORT)  # fmt: skip
    assert (ran.code, (tmp_path / "new").exists()) == (1, False)
    assert "a run without validation data has no best adapter" in ran.err
    assert cli("lora", "--train", "--best", "--model", model_folder, "--data", data_folder).code == 2
    assert cli("fuse", "--model", model_folder, "--best").code == 2


def test_a_run_whose_last_adapter_is_the_best_says_so(model_folder, data_folder, tmp_path, cli):
    ran = cli("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a",
              "--iters", 2, "--rank", 4, "--json")  # fmt: skip
    assert ran.json["last_valid_loss"] == ran.json["best_valid_loss"]
    assert "the last adapter is the best one" in ran.err


# ---- a finished run is replaced only if asked ----


def test_a_finished_run_is_not_replaced_unasked(run, model_folder, data_folder, expect_refusal):
    line = ("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", run)
    says = [f"{run}: training would replace what is here", "a finished run of 4 steps", "--overwrite"]
    expect_refusal(*line, *SHORT, says=says)
    (run / "training_state.safetensors").unlink()
    expect_refusal(*line, *SHORT, says=["an adapter without a readable state of its run", "--overwrite"])


@pytest.mark.parametrize("by", ["option", "file"])
def test_overwrite_replaces_a_finished_run(run, model_folder, data_folder, tmp_path, cli, by):
    (tmp_path / "run.yaml").write_text("overwrite: true\n")
    how = ("--overwrite",) if by == "option" else ("-c", tmp_path / "run.yaml")
    line = ("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", run, "--iters", 1)
    ran = cli(*line, *how, "--rank", 4, "--json")
    assert ran.json["steps"] == 1
    assert f"starting anew: a finished run of 4 steps in {run} is replaced" in ran.err


def test_resume_wins_over_overwrite_in_the_file(run, model_folder, data_folder, tmp_path, cli):
    (tmp_path / "run.yaml").write_text("overwrite: true\n")
    line = ("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", run, *SHORT, *WORSE)
    ran = cli(*line, "-c", tmp_path / "run.yaml", "--resume")
    assert ran.code == 0, ran.err
    assert "nothing left to do" in ran.err
    both = cli(*line, "--overwrite", "--resume")
    assert both.code == 2
    assert "overwrite: expected without resume" in both.err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--sample-tokens", 0, "--sample-prompt", "x"), "sample_tokens: expected at least 1, found 0"),
        (
            ("--sample-prompt", "<turn_end>"),
            "sample_prompt 1 cannot be used",
        ),
        (("--sample-prompt", ""), "sample_prompts: expected texts that are not empty"),
        (("--sample-prompt", "word " * 5000), "leaves no room for an answer"),
        (("--name", "a-b"), "a-b"),
        (("--report-to", "nothing"), "unknown report"),
        (("--patience", -1), "patience: expected at least 0"),
        (("--resume-adapter-file", "nowhere"), "nowhere"),
    ],
)
def test_every_setting_is_checked_before_a_run_is_replaced(run, model_folder, data_folder, cli, wrong, says):
    before = files_of(run)
    ran = cli("lora", "--train", "--overwrite", "--model", model_folder, "--data", data_folder, "--adapter-path", run,
              *SHORT, *wrong)  # fmt: skip
    assert ran.code in (1, 2)
    assert says in ran.err
    assert files_of(run) == before


# ---- one process a folder ----

LONG = ("--iters", 10**6, "--batch-size", 2, "--rank", 4, "--save-every", 1)


@pytest.fixture
def training(model_folder, data_folder, tmp_path):
    """A process that trains in the folder `run`, past its first save, and the command line."""
    line = [
        "lora",
        "--train",
        "--model",
        model_folder,
        "--data",
        data_folder,
        "--adapter-path",
        tmp_path / "run",
        *LONG,
    ]
    line = [str(argument) for argument in line]
    process = subprocess.Popen([sys.executable, "-m", "mlx_afm", *line], stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "adapters.safetensors").exists():
        assert process.poll() is None, "the process ended early"
        time.sleep(0.05)
    yield process, line
    process.kill()
    process.wait()


def test_a_second_run_in_the_same_folder_is_refused_at_once(training, tmp_path, cli):
    process, line = training
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "link"):
        ran = cli(*line, "--adapter-path", folder)
        assert ran.code == 1
        assert ran.err == (
            f"mlx-afm: {folder}: another process is writing this folder. "
            "Wait for it to end, or choose another folder.\n"
        )
    process.send_signal(signal.SIGINT)
    process.wait()
    assert process.returncode == 130, "the first run is not disturbed"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link"}
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    records = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records].count("start") == 1


def test_a_killed_run_blocks_nobody_and_its_remains_are_removed(training, tmp_path, cli, monkeypatch):
    process, line = training
    process.kill()
    process.wait()
    (tmp_path / "run" / ".adapters.safetensors.abcdefgh.part").write_bytes(b"half")
    line[line.index("--iters") + 1] = "3"
    ran = cli(*line, "--schedule", "constant", "--overwrite")
    assert ran.code == 0, ran.err
    assert "the unfinished output of a killed process" in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def test_a_lock_is_held_from_python_too(training, tmp_path, model_folder, data_folder):
    job = mlx_afm.LoRAJob(model=model_folder, data=data_folder, adapter_path=tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is writing this folder"):
        mlx_afm.train(job)
    with pytest.raises(ConfigError, match="another process is writing this folder"):
        mlx_afm.convert(model_folder, tmp_path / "run")


# ---- a full disk ----


def test_a_full_disk_says_what_is_needed_and_the_run_can_be_resumed(
    model_folder, data_folder, tmp_path, cli, full_disk, monkeypatch
):
    line = ("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "run",
            *SHORT, "--save-every", 2)  # fmt: skip
    with full_disk(after=6):
        ran = cli(*line)
    assert ran.code == 1
    message = ran.err.partition("mlx-afm: ")[2]
    assert message.startswith(f"{tmp_path / 'run'}")
    assert re.search(r"not enough disk space \(expected \d\.\d\d MB free, found ", message)
    assert "then repeat the command with --resume: the last saved state is intact." in message
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".lock"))]
    trained_bytes = (tmp_path / "run" / "best" / "adapters.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5 * trained_bytes))
    new = cli(*line, "--adapter-path", tmp_path / "new")
    assert new.code == 1
    assert "not enough disk space" in new.err
    assert cli(*line, "--resume", "--json").json["steps"] == 4
