"""Quantized folders from the command line: convert -q and -d, inspect, generate, lora, fuse."""

import json
import re
import shlex

import pytest

import mlx_afm
from mlx_afm_cli import quantize_options


def test_the_choices_are_those_of_the_library():
    from mlx_afm.quant import MODES, RECIPES

    assert set(quantize_options.MODES) == set(MODES)
    assert set(quantize_options.RECIPES) == set(RECIPES)


def convert(cli, source, target, *options):
    return cli("convert", "--hf-path", source, "--mlx-path", target, *options, "--json")


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        (["-q"], {"affine 4-bit": 25}),
        (["-q", "--q-bits", 8, "--q-group-size", 32], {"affine 8-bit": 25}),
        (["-q", "--q-mode", "balanced"], {"affine 4-bit": 1, "balanced 2-bit": 24}),
        (["-q", "--q-recipe", "apple"], {"affine 4-bit": 1, "balanced 2-bit": 24}),
        (["-q", "--q-mode", "mxfp8", "--dtype", "bfloat16"], {"mxfp8 8-bit": 25}),
    ],
)
def test_quantize_inspect_generate_and_make_dense(options, forms, toolkit_folder, tmp_path, cli, say):
    ran = convert(cli, toolkit_folder, tmp_path / "q", *options)
    told = ran.json
    assert told["quantized"] == forms
    assert len(told["left_dense"]) == 6  # 312 columns
    assert "Not quantized, because the group size does not divide" in ran.err
    inspected = cli("inspect", tmp_path / "q", "--json").json
    assert (inspected["quantization"], inspected["bits_per_weight"]) == (forms, told["bits_per_weight"])
    assert inspected["parameters"] == 737232
    assert say(model=tmp_path / "q") == say("--kv-bits", "8", model=tmp_path / "q")
    dense = convert(cli, tmp_path / "q", tmp_path / "d", "-d").json
    assert (dense["quantized"], dense["form"]) == ({}, "mlx")
    assert "quantization" not in json.loads((tmp_path / "d" / "config.json").read_text())


def test_train_and_fuse(toolkit_folder, data_folder, tmp_path, cli, say):
    convert(cli, toolkit_folder, tmp_path / "q", "-q", "--q-bits", 8)
    run = ("lora", "--model", tmp_path / "q", "--train", "--data", data_folder, "--adapter-path", tmp_path / "a")
    assert cli(*run, "--iters", 2, "--batch-size", 2, "--rank", 4, "--json").code == 0
    fuse = ("fuse", "--model", tmp_path / "q", "--adapter-path", tmp_path / "a", "--json", "--save-path")
    kept = cli(*fuse, tmp_path / "kept")
    assert (kept.json["form"], kept.json["difference"]) == ("codes", 0)
    assert "base_adapter" in kept.err
    dense = cli(*fuse, tmp_path / "dense", "--dequantize").json
    assert dense["form"] == "dense"
    assert dense["difference"] < 1e-2
    said = say("--adapter-path", tmp_path / "a", model=tmp_path / "q")
    assert said == say(model=tmp_path / "kept") == say(model=tmp_path / "dense")


def test_options_of_q_need_it(toolkit_folder, tmp_path, cli):
    ran = convert(cli, toolkit_folder, tmp_path / "q", "--q-bits", 4)
    assert ran.code == 2
    assert "--q-bits without -q" in ran.err


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (["-q", "--q-bits", 7], ["bits: mode affine has", "found 7"], 2),
        (["-q", "--q-recipe", "apple", "--q-bits", 2], ["recipe apple already sets bits"], 2),
        (["-q", "--q-group-size", 128], ["no matrix can be quantized", "96 columns"], 1),
        (["-q", "-d"], ["either quantize or dequantize"], 2),
        (["-q", "--to", "torch"], ["a torch checkpoint has no codes"], 2),
        (["-d"], ["nothing to dequantize"], 1),
    ],
)
def test_what_cannot_be_is_refused(options, says, code, model_folder, tmp_path, expect_refusal):
    expect_refusal("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "q", *options, says=says, code=code)


def test_codes_do_not_go_to_torch(model_folder, tmp_path, cli, expect_refusal):
    convert(cli, model_folder, tmp_path / "q", "-q")
    expect_refusal(
        "convert", "--hf-path", tmp_path / "q", "--to", "torch", "--out", tmp_path / "t", says=["convert -d"]
    )
    convert(cli, tmp_path / "q", tmp_path / "d", "-d")
    assert convert(cli, tmp_path / "d", tmp_path / "t", "--to", "torch").json["form"] == "torch"


def test_lora_goes_on_from_an_initial_adapter_by_both_defaults(model_folder, data_folder, tmp_path, cli):
    quantized = tmp_path / "q"
    line = ("convert", "--hf-path", model_folder, "--mlx-path", quantized, "-q", "--q-recipe", "apple")
    assert cli(*line, "--init-adapter", "residual-svd").code == 0
    config = json.loads((quantized / "base_adapter" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == mlx_afm.LoRAConfig().rank == mlx_afm.InitConfig().rank
    told = cli("lora", "--train", "--model", quantized, "--data", data_folder, "--adapter-path", tmp_path / "a",
               "--iters", 1, "--json").json  # fmt: skip
    assert told["steps"] == 1


@pytest.mark.parametrize("scale", ["0.5", "0.3333333333333333"])
def test_the_advice_for_a_base_adapter_of_another_rank_works(model_folder, data_folder, tmp_path, cli, scale):
    """Both ways out are tried as they are written."""
    quantized = tmp_path / "q"
    line = ("convert", "--hf-path", model_folder, "--mlx-path", quantized, "-q", "--q-recipe", "apple")
    assert cli(*line, "--init-adapter", "residual-svd", "--rank", 3, "--scale", scale).code == 0
    train = ("lora", "--train", "--model", quantized, "--data", data_folder, "--iters", 1, "--adapter-path")
    ran = cli(*train, tmp_path / "a", "--rank", 8)
    assert ran.code == 1
    assert f"expected rank 3, scale {scale}, found rank 8, scale 0.5" in ran.err
    options = re.search(r"Train in its form \(([^)]*)\)", ran.err)[1].split()
    assert cli(*train, tmp_path / "b", *options).code == 0
    fuse = re.search(r"first: mlx-afm (fuse .*)$", ran.err.strip())[1]
    assert cli(*shlex.split(fuse.replace("FUSED", str(tmp_path / "fused")))).code == 0
    assert cli("lora", "--train", "--model", tmp_path / "fused", "--data", data_folder, "--iters", 1, "--adapter-path",
               tmp_path / "c", "--rank", 8).code == 0  # fmt: skip
