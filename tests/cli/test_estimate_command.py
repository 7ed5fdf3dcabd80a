import pytest

from mlx_afm.data import read_tokens
from mlx_afm.model_folder import ModelFolder
from mlx_afm.workflows import lora as lora_workflow

PARTS = {"weights", "adapter", "gradients", "optimizer", "activations", "working", "loss", "update", "peak"}


def test_the_real_model_by_default(cli):
    told = cli("estimate", "--max-seq-length", 512, "--memory", "16GB", "--json").json
    assert {f"{part}_bytes" for part in PARTS} <= set(told)
    assert told["weights_bytes"] == 2 * 3_111_368_064 + 280
    assert (told["rows"], told["tokens"], told["needed"]) == (4, 512, 128)
    assert (told["memory_bytes"], told["usable_bytes"]) == (16 * 10**9, 12 * 10**9)
    assert told["fits"] is (told["peak_bytes"] <= told["usable_bytes"])


def test_less_than_enough_says_what_would_fit(cli):
    told = cli("estimate", "--max-seq-length", 512, "--memory", "8GB", "--json").json
    assert told["fits"] is False
    assert told["largest_batch_size"] == 0
    assert told["ways_to_fit"]
    assert all(peak <= told["usable_bytes"] for peak in told["ways_to_fit"].values())
    assert any("--grad-checkpoint and a 4-bit base" in way for way in told["ways_to_fit"])
    ran = cli("estimate", "--max-seq-length", 512, "--memory", "8GB")
    assert "fits: --grad-checkpoint and a" in ran.err


def test_the_largest_batch_fits_and_one_more_does_not(cli):
    line = ("estimate", "--max-seq-length", 512, "--base", "4-bit", "--memory", "16GiB", "--json")
    most = cli(*line).json["largest_batch_size"]
    assert cli(*line, "--batch-size", most).json["fits"] is True
    assert cli(*line, "--batch-size", most + 1).json["fits"] is False


def test_a_folder_and_its_data(model_folder, data_folder, cli):
    line = ("estimate", "--model", model_folder, "--rank", 4, "--json")
    whole = cli(*line).json
    real = cli(*line, "--data", data_folder, "--no-cache").json
    assert whole["tokens"] == 4096
    assert real["tokens"] < 200
    assert real["peak_bytes"] < whole["peak_bytes"]
    assert real["weights_bytes"] == whole["weights_bytes"]
    packed = cli(*line, "--data", data_folder, "--no-cache", "--batch-tokens", 512).json
    assert packed["rows"] == 1


def test_the_table(cli):
    ran = cli("estimate", "--table")
    assert ran.code == 0
    assert "| bfloat16 | yes |" in ran.out
    rows = cli("estimate", "--table", "--json").json["table"]
    assert {row["base"] for row in rows} == {"float32", "bfloat16", "4-bit", "2-bit"}
    for row in rows:
        counts = list(row["rows"].values())
        assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("line", "says"),
    [(("--memory", "lots"), "a number of bytes such as 200MB"), (("--data", "x"), "--data needs --model")],
)
def test_wrong_usage(line, says, cli):
    ran = cli("estimate", *line)
    assert ran.code == 2
    assert says in ran.err


def test_an_unknown_base(expect_refusal):
    expect_refusal("estimate", "--base", "3-bit", says=["unknown form of base weights", "2-bit"], code=2)


def test_training_states_its_peak_and_refuses_what_cannot_be(model_folder, data_folder, tmp_path, cli, monkeypatch):
    line = ["lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "a",
            "--iters", 1, "--batch-size", 1, "--rank", 2, "--no-cache"]  # fmt: skip
    monkeypatch.setattr(lora_workflow, "machine_memory", lambda: 1_000_000)
    monkeypatch.setattr(lora_workflow.ModelFolder, "load_model", lambda folder: pytest.fail("loaded"))
    ran = cli(*line)
    assert ran.code == 1
    assert "estimated peak memory" in ran.err
    assert "needs more memory than there is" in ran.err
    assert "--ignore-memory" in ran.err
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    ran = cli(*line, "--ignore-memory")
    assert ran.code == 0
    assert ran.err.index("estimated peak memory") < ran.err.index("training ")


def test_what_frozen_layers_take_on_disk_is_told(cli, model_folder, data_folder):
    line = ["estimate", "--model", model_folder, "--data", data_folder, "--rank", 4, "--json"]
    assert "frozen_cache_bytes" not in cli(*line).json
    told = cli(*line, "--layers", "reuse").json
    config = ModelFolder(model_folder).config
    data = read_tokens((data_folder / "train.jsonl",), model_folder / "tokenizer.model")
    read, trained = len(data.ids) - len(data), int(data.trained.sum())
    assert told["frozen_layers"] == 4
    assert told["frozen_cache_bytes"] == 4 * config.hidden_dim * trained + 2 * config.kv_dim * read
    assert told["peak_bytes_once_kept"] < told["peak_bytes"]
