"""mlx-afm recover, and convert's start values, from the command line."""

import json

import pytest

from mlx_afm_cli import quantize_options

SHORT = ("--iters", 2, "--batch-size", 2, "--rank", 4)


def test_the_choices_are_those_of_the_library():
    from mlx_afm.quant.residual import INITS

    assert quantize_options.INITS == INITS


@pytest.fixture
def codes(cli, model_folder, data_folder, tmp_path):
    convert = ("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "q", "-q", "--q-recipe", "apple")
    init = ("--init-adapter", "residual-svd", "--rank", 4, "--init-rounds", 2)
    ran = cli(*convert, *init, "--calibration-data", data_folder, "--calibration-examples", 3, "--json")
    told = ran.json
    assert told["base_adapter"] == "active"
    assert all(after < before for before, after in told["init_errors"].values())
    assert "writing starts after that" in ran.err
    return tmp_path / "q"


def test_recover_into_the_base_and_train_on(cli, codes, model_folder, data_folder, tmp_path):
    run = ("recover", "--model", codes, "--teacher", model_folder, "--data", data_folder, *SHORT)
    told = cli(*run, "--adapter-path", tmp_path / "r", "--into-base", "--json").json
    assert (told["steps"], told["base_adapter"]) == (2, str(codes / "base_adapter"))
    last, kept = (folder / "adapters.safetensors" for folder in (tmp_path / "r", codes / "base_adapter"))
    assert last.read_bytes() == kept.read_bytes()
    feature = ("lora", "--model", codes, "--train", "--data", data_folder, "--adapter-path", tmp_path / "f", *SHORT)
    assert cli(*feature, "--json").json["steps"] == 2


def test_next_token_needs_no_teacher(cli, model_folder, data_folder, tmp_path):
    codes = tmp_path / "plain"
    assert cli("convert", "--hf-path", model_folder, "--mlx-path", codes, "-q", "--json").json["base_adapter"] == "zero"
    run = ("recover", "--model", codes, "--loss", "next-token", "--data", data_folder, *SHORT)
    told = cli(*run, "--adapter-path", tmp_path / "r", "--json").json
    assert told["base_adapter"] is None
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert "teacher" not in config["sources"]


def test_refusals(model_folder, data_folder, tmp_path, expect_refusal):
    run = ("recover", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "r")
    expect_refusal(*run, says=["teacher: expected the unquantized model's folder, found None"], code=2)
    expect_refusal(*run, "--teacher", model_folder, says=["nothing to recover", "convert -q"])
    expect_refusal(*run, "--loss", "next-token", "--teacher", model_folder, says=["expected none"], code=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-q", "--rank", 4], "--rank without --init-adapter"),
        (["-q", "--calibration-examples", 4], "--calibration-examples without --calibration-data"),
        (["--init-adapter", "weight-svd"], "--init-adapter without -q"),
    ],
)
def test_options_without_what_they_belong_to(options, says, cli, model_folder, tmp_path):
    ran = cli("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "x", *options)
    assert ran.code == 2
    assert says in ran.err


def test_qat_from_the_command_line(cli, model_folder, data_folder, tmp_path, say):
    run = ("lora", "--model", model_folder, "--train", "--data", data_folder, "--adapter-path", tmp_path / "a")
    refused = cli(*run, "--fine-tune-type", "qat", "--iters", 1)
    assert refused.code == 1
    assert "312 columns" in refused.err
    assert "--targets" in refused.err
    options = ("--fine-tune-type", "qat", "--targets", "q,k,v,o,gate,up", "--iters", 2, "--batch-size", 2)
    assert cli(*run, *options, "--test", "--json").json["steps"] == 2
    fuse = ("fuse", "--model", model_folder, "--adapter-path", tmp_path / "a", "--save-path", tmp_path / "codes")
    told = cli(*fuse, "--json").json
    assert (told["form"], told["difference"]) == ("trained codes", 0)
    assert say(model=tmp_path / "codes") == say("--adapter-path", tmp_path / "a", model=model_folder)
