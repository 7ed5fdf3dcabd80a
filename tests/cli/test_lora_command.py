import json
import math
import os
import shlex
import signal

import pytest

from mlx_afm.adapters import is_zero, read_adapter

STEPS = ("--iters", 4, "--batch-size", 4, "--steps-per-eval", 1, "--steps-per-report", 2, "--seed", 5)


@pytest.fixture(scope="module")
def run(model_folder, data_folder, tmp_path_factory):
    """A run of four steps that ends worse than it was: its rate grows beyond reason."""
    from mlx_afm_cli.main import main

    folder = tmp_path_factory.mktemp("run") / "adapter"
    options = ("--model", model_folder, "--data", data_folder, "--adapter-path", folder, *STEPS)
    rate = ("--learning-rate", 0.1, "--warmup", 4, "--schedule", "constant", "--name", "tidy")
    with pytest.raises(SystemExit) as stop:
        main(["lora", "--train", *map(str, options), *map(str, rate)])
    assert not stop.value.code
    return folder


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_files_of_a_run(run):
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    adapter = {"adapters.safetensors", "adapter_config.json"}
    assert files == adapter | {f"best/{name}" for name in adapter} | {"metrics.jsonl", "training_state.safetensors"}
    assert not is_zero(read_adapter(run))


def test_metrics_are_one_event_a_line(run):
    lines = events(run)
    assert [line["event"] for line in lines] == [
        "start", "eval", "eval", "train", "eval", "eval", "train", "eval", "end",
    ]  # fmt: skip
    assert (lines[0]["total_steps"], lines[0]["examples"]) == (4, 20)
    assert [line["step"] for line in lines if line["event"] == "train"] == [2, 4]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1]["best_loss"] == min(line["loss"] for line in lines if line["event"] == "eval")


def test_the_last_adapter_and_the_best_score_what_the_run_said(run, model_folder, data_folder, cli):
    losses = [line["loss"] for line in events(run) if line["event"] == "eval"]
    assert losses[-1] > min(losses)
    for adapter, loss in ((run, losses[-1]), (run / "best", min(losses))):
        told = cli("lora", "--test", "--model", model_folder, "--data", data_folder / "valid.jsonl", "--adapter-path",
                   adapter, "--json").json  # fmt: skip
        assert told["test_loss"] == pytest.approx(loss, rel=1e-5)
        assert told["test_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert (told["test_examples"], told["adapter"], told["adapter_path"]) == (4, True, str(adapter))


def test_the_adapter_says_how_it_was_made(run, model_folder, data_folder):
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"] == {"rank": 32, "scale": 0.5, "dropout": 0.0}
    assert config["model"] == str(model_folder)
    assert set(config["data"]) == {"train", "valid", "test"}
    wanted = {
        "iters": 4,
        "batch_size": 4,
        "learning_rate": 0.1,
        "schedule": "constant",
        "seed": 5,
        "weight_decay": 0.01,
    }
    assert wanted.items() <= config["train"].items()


def test_train_and_test_in_one_go(model_folder, data_folder, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder `adapters`
    ran = cli("lora", "--train", "--test", "--model", model_folder, "--data", data_folder,
              "--adapter-path", tmp_path / "a", "--iters", 3, "--json")  # fmt: skip
    told = ran.json
    assert (told["steps"], told["test_examples"], told["adapter"]) == (3, 4, True)
    base = cli("lora", "--test", "--model", model_folder, "--data", data_folder, "--json").json
    assert base["adapter"] is False
    assert told["test_loss"] < base["test_loss"]
    assert "training 345,600 parameters on 20 examples, 3 steps" in ran.err
    assert "step 3/3  loss " in ran.err
    assert "done after 3 steps" in ran.err


def test_one_file_is_trained_on_and_there_is_no_best(model_folder, data_folder, tmp_path, cli):
    told = cli("lora", "--train", "--model", model_folder, "--data", data_folder / "train.jsonl", "--adapter-path",
               tmp_path / "a", "--iters", 1, "--json").json  # fmt: skip
    assert (told["steps"], told["best_valid_loss"]) == (1, None)
    assert not (tmp_path / "a" / "best").exists()


def test_epochs_count_the_data(model_folder, data_folder, tmp_path, cli):
    told = cli("lora", "--train", "--model", model_folder, "--data", data_folder / "valid.jsonl",
               "--adapter-path", tmp_path / "a", "--epochs", 2, "--batch-size", 2, "--grad-accumulation-steps", 2,
               "--json").json  # fmt: skip
    assert told["steps"] == 2


def test_the_same_seed_gives_the_same_adapter(model_folder, data_folder, tmp_path, cli):
    for name in "ab":
        assert cli("lora", "--train", "--model", model_folder, "--data", data_folder / "valid.jsonl", "--adapter-path",
                   tmp_path / name, "--iters", 2, "--dropout", 0.1, "--seed", 7).code == 0  # fmt: skip
    first, second = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_config_file_trains_and_flags_win(model_folder, data_folder, tmp_path, cli):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_folder}\ndata: {data_folder}\nadapter_path: {tmp_path / 'unused'}\ntrain: true\niters: 500\n"
        "batch-size: 2\nlearning_rate: 2e-4\nval_batches: 1\nmax_seq_length: 600\n"
        "lora_parameters:\n  rank: 8\n  scale: 2.0\n  dropout: 0.0\n"
    )
    told = cli("lora", "-c", file, "--iters", 1, "--adapter-path", tmp_path / "a", "--json").json
    assert told["steps"] == 1
    assert not (tmp_path / "unused").exists()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 8, "scale": 2.0, "dropout": 0.0}
    wanted = {"iters": 1, "batch_size": 2, "learning_rate": 2e-4, "val_batches": 1, "schedule": "cosine"}
    assert wanted.items() <= config["train"].items()


def test_an_adapter_that_is_not_there_is_not_scored_as_the_base(model_folder, data_folder, tmp_path, cli):
    ran = cli("lora", "--test", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "typo")
    assert ran.code == 1
    assert "no adapter here" in ran.err


def test_settings_of_validation_without_its_data_are_told(model_folder, data_folder, tmp_path, cli, copy_of):
    data = copy_of(data_folder)
    (data / "valid.jsonl").unlink()
    line = ("lora", "--train", "--model", model_folder, "--data", data, "--iters", 1, "--batch-size", 2, "--no-cache")
    options = ("--val-batches", 3, "--patience", 2, "--steps-per-eval", 1)
    ran = cli(*line, "--adapter-path", tmp_path / "a", *options)
    assert ran.code == 0, ran.err
    assert "no effect without validation data: val_batches, patience, steps_per_eval" in ran.err
    assert "no effect" not in cli(*line, "--adapter-path", tmp_path / "b").err


def test_what_will_be_scored_is_checked_before_training(model_folder, data_folder, tmp_path, cli, copy_of):
    data = copy_of(data_folder)
    (data / "test.jsonl").unlink()
    ran = cli("lora", "--train", "--test", "--model", model_folder, "--data", data, "--adapter-path", tmp_path / "a")
    assert ran.code == 1
    assert "no test split (expected test.jsonl" in ran.err
    assert not (tmp_path / "a").exists()


OPTIONS = ("--iters", 6, "--batch-size", 4, "--steps-per-report", 2, "--save-every", 2, "--rank", 4)


@pytest.fixture
def signal_at(monkeypatch):
    """A function that makes training send this process signals when it gets to a step."""
    from mlx_afm.training import trainer

    def at(step, *numbers):
        plain = trainer.train_step

        def step_and_signal(*arguments, **settings):
            result = plain(*arguments, **settings)
            done.append(result)
            if len(done) == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return result

        done = []
        monkeypatch.setattr(trainer, "train_step", step_and_signal)

    return at


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_the_run_can_be_resumed(
    number, code, model_folder, data_folder, tmp_path, cli, signal_at, monkeypatch
):
    whole, folder = tmp_path / "whole", tmp_path / "a b"
    line = ["lora", "--train", "--model", model_folder, "--data", data_folder, *OPTIONS, "--json", "--adapter-path"]
    assert cli(*line, whole).json["steps"] == 6
    before = signal.getsignal(number)
    signal_at(3, number)
    monkeypatch.setattr("sys.argv", ["mlx-afm", *map(str, line), str(folder)])
    ran = cli(*line, folder)
    assert ran.code == code
    assert signal.getsignal(number) is before
    told = json.loads(ran.out)
    assert (told["adapter_path"], told["steps"], told["interrupted"]) == (str(folder), 3, True)
    assert "stopped and saved after step 3 of 6" in ran.err
    (told,) = [text for text in ran.err.splitlines() if text.startswith("to go on: ")]
    assert shlex.split(told)[3:] == ["mlx-afm", *map(str, line), str(folder), "--resume"]
    again = cli(*line, folder, "--resume")
    assert again.json["steps"] == 6
    assert "resuming after step 3 of 6" in again.err
    assert (folder / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    finished = cli(*line, folder, "--resume")
    assert "nothing left to do" in finished.err
    assert finished.json["steps"] == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_stops_at_once(number, code, model_folder, data_folder, tmp_path, cli, signal_at):
    line = [
        "lora",
        "--train",
        "--model",
        model_folder,
        "--data",
        data_folder,
        *OPTIONS,
        "--adapter-path",
        tmp_path / "a",
    ]
    signal_at(3, number, number)
    ran = cli(*line)
    assert ran.code == code
    assert "stopped and saved" not in ran.err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert cli(*line, "--resume").code == 0


def test_samples_spikes_and_patience_are_told(model_folder, data_folder, tmp_path, cli):
    ran = cli("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a",
              "--iters", 40, "--learning-rate", 3.0, "--schedule", "constant", "--warmup", 0, "--steps-per-eval", 1,
              "--patience", 2, "--sample-prompt", "list all", "--sample-tokens", 3, "--rank", 4)  # fmt: skip
    assert ran.code == 0
    assert "step 0  'list all' -> " in ran.err
    assert "(no better than at step" in ran.err
    sampled = [line for line in events(tmp_path / "a") if line["event"] == "sample"]
    assert [line["step"] for line in sampled] == list(range(len(sampled)))
    end = events(tmp_path / "a")[-1]
    assert (end["event"], end["stopped_early"], end["step"]) == ("end", True, sampled[-1]["step"])
    assert end["best_step"] == end["step"] - 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_there_is_anything_to_save_one_signal_is_enough(
    number, code, model_folder, data_folder, tmp_path, cli, monkeypatch
):
    from mlx_afm.workflows import lora

    plain = lora.ModelFolder.load_model
    monkeypatch.setattr(lora.ModelFolder, "load_model", lambda *a, **k: os.kill(os.getpid(), number) or plain(*a, **k))
    ran = cli("lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a")
    assert ran.code == code
    assert not (tmp_path / "a").exists()
