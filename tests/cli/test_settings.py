from dataclasses import asdict
from pathlib import Path

import click
import pytest

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.training import TrainConfig
from mlx_afm_cli.settings import request_from
from mlx_afm_cli.settings_file import KNOWN, TYPES, read_settings

PLACES = {"model": Path("m"), "data": Path("d")}


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def test_every_option_has_a_type():
    assert set(TYPES) == KNOWN - {"lora_parameters"}


def test_defaults_are_the_dataclasses():
    request = request_from(None, {**PLACES, "iters": None, "rank": None})
    job = request.job
    assert (job.lora, job.train) == (LoRAConfig(), TrainConfig())
    assert (job.adapter_path, job.name, job.data_config.max_tokens) == (Path("adapters"), None, 4096)
    assert (request.train, request.test, request.adapter_given) == (False, False, False)


def test_defaults_then_file_then_flags(yaml_file):
    file = yaml_file("model: m\ndata: d\niters: 7\nseed: 3\nmax_seq_length: 99\nname: tidy\ntest: true\n")
    request = request_from(file, {"iters": 2, "data": Path("elsewhere"), "seed": None})
    job = request.job
    assert (job.train.iters, job.train.seed, job.train.batch_size) == (2, 3, TrainConfig().batch_size)
    assert (job.model, job.data, job.data_config.max_tokens, job.name) == (Path("m"), Path("elsewhere"), 99, "tidy")
    assert (request.train, request.test, job.test) == (False, True, True)


def test_epochs_as_a_flag_beat_iters_in_the_file(yaml_file):
    job = request_from(yaml_file("iters: 7\n"), {**PLACES, "epochs": 3}).job
    assert (job.train.iters, job.train.epochs) == (None, 3)


def test_mlx_lms_block(yaml_file):
    job = request_from(yaml_file("lora_parameters: {rank: 8, scale: 20.0, dropout: 0.1}\n"), {**PLACES, "rank": 4}).job
    assert asdict(job.lora) == {**asdict(LoRAConfig()), "rank": 4, "scale": 20.0, "dropout": 0.1}


@pytest.mark.parametrize("text", ["targets: [q, v]", "targets: q,v", 'targets: " q , v,"'])
def test_targets_as_list_or_text(text, yaml_file):
    assert request_from(yaml_file(text), PLACES).job.lora.targets == ("q", "v")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("2E-5", 2e-5), ("1.5e-4", 1.5e-4), ("1", 1.0)])
def test_rates_are_numbers_however_yaml_reads_them(text, value, yaml_file):
    assert request_from(yaml_file(f"learning_rate: {text}"), PLACES).job.train.learning_rate == value


def test_null_is_left_out(yaml_file):
    assert request_from(yaml_file("iters: null\nlora_parameters: null\nseed: 2"), PLACES).job.train == TrainConfig(
        seed=2
    )


@pytest.mark.parametrize(("flags", "missing"), [({}, "--model and --data"), ({"model": Path("m")}, "--data")])
def test_model_and_data_are_needed(flags, missing):
    with pytest.raises(click.UsageError, match=f"missing {missing}$"):
        request_from(None, flags)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("itres: 3\nbatchsize: 2\nqwerty: 1", ["itres: is it 'iters'?", "batchsize: is it 'batch_size'?", "  qwerty"]),
        ("lora_parameters: {rank: 8, aplha: 16}", ["unknown options", "aplha: is it 'alpha'?"]),
        ("optimizer_config: 3\nrate_factors: [1]", ["optimizer_config: expected a mapping", "rate_factors: expected"]),
        ("sample_prompt: 3\nuse_rslora: 1", ["sample_prompt: expected a text", "use_rslora: expected true or false"]),
        ("lora_parameters: 8", ["lora_parameters is not a mapping", "expected rank, scale, dropout, found 8"]),
        ("iters: 2.5\nbatch_size: four", ["iters: expected a whole number, found 2.5", "found 'four'"]),
        ("learning_rate: fast\nwarmup: [1]", ["learning_rate: expected a number, found 'fast'", "found [1]"]),
        ("seed: true", ["seed: expected a whole number, found True"]),
        ("train: 'false'", ["train: expected true or false, found 'false'"]),
        ("targets: 3", ["targets: expected a list of names", "found 3"]),
        ("model: 3\nadapter_path: [a]", ["model: expected text, found 3", "adapter_path: expected text"]),
        ("rate_factors: {lora_b: x}", ["rate_factors: expected a mapping of names to numbers, found {'lora_b': 'x'}"]),
        ("rate_factors: {lora_b: [1]}", ["rate_factors: expected a mapping of names to numbers"]),
        ("rate_factors: {1: 2}", ["rate_factors: expected a mapping of names to numbers"]),
        ("targets: [1]\nreport_to: [x, {}]", ["targets: expected a list of names", "report_to: expected a list"]),
        ("sample_prompt: [3]\nfield: {a: b}", ["sample_prompt: expected a text", "field: expected a text, or a list"]),
        ("alpha: " + "9" * 400, ["alpha: expected a number"]),
        ("1: 2", ["keys that are no names", "  1"]),
        ("iters: 1\nseed: 2\niters: 3", ["a key occurs twice", "line 3: iters"]),
        ("batch-size: 1\nbatch_size: 2", ["a key occurs twice", "line 2: batch_size"]),
        ("rank: 8\nlora_parameters: {rank: 16}", ["keys in lora_parameters and outside it", "  rank"]),
        ("- iters", ["not a mapping of options"]),
        ("", ["not a mapping of options"]),
        ("iters: 3\nmodel: {", ["run.yaml line 2: not YAML"]),
        (b"iters: \xff", ["not YAML"]),
        ("seed: " + "9" * 5000, ["not YAML"]),
        ("[" * 3000, ["not YAML"]),
    ],
)
def test_a_faulty_file_names_every_fault(text, says, yaml_file):
    file = yaml_file(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(file)
    for part in (str(file), *says):
        assert part in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file \(expected a YAML file of options\)"):
        read_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "flags", "scale"),
    [
        ("alpha: 16", {}, 0.5),
        ("lora_parameters: {rank: 8, alpha: 16}", {}, 2.0),
        ("alpha: 16\nrank: 16\nuse_rslora: true", {}, 4.0),
        ("scale: 3", {"alpha": 8.0, "rank": 4}, 2.0),
        ("alpha: 3", {"scale": 0.25}, 0.25),
    ],
)
def test_the_scale_in_both_ways(text, flags, scale, yaml_file):
    assert request_from(yaml_file(text), {**PLACES, **flags}).job.lora.scale == scale


@pytest.mark.parametrize(
    ("text", "flags", "layers"),
    [
        ("num_layers: 16", {}, "last-16"),
        ("num_layers: -1", {}, "all"),
        ("layers: 0-3", {"num_layers": 2}, "last-2"),
        ("num_layers: 4", {"layers": "reuse"}, "reuse"),
    ],
)
def test_the_layers_in_both_ways(text, flags, layers, yaml_file):
    assert request_from(yaml_file(text), {**PLACES, **flags}).job.lora.layers == layers


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"alpha": 8.0, "scale": 0.5}, "alpha and scale exclude each other"),
        ({"layers": "reuse", "num_layers": 3}, "layers and num_layers exclude each other"),
        ({"num_layers": 0}, "num_layers out of range"),
        ({"iters": 3, "epochs": 2}, "iters and epochs exclude each other"),
        ({"fine_tune_type": "full", "rank": 8}, "rank: only lora and dora have it"),
        ({"fine_tune_type": "qat", "dropout": 0.1}, "dropout: only lora and dora have it"),
        ({"sample_tokens": 8}, "sample_tokens has no effect without sample_prompt"),
        ({"project_name": "p"}, "project_name has no effect without report_to"),
        ({"use_rslora": True}, "use_rslora: expected with alpha"),
        ({"fine_tune_type": "full", "targets": "q"}, "full fine-tuning takes whole layers"),
    ],
)
def test_what_cannot_be_said(flags, says):
    with pytest.raises(ConfigError, match=says):
        request_from(None, {**PLACES, **flags})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mask_prompt: false", ["mask_prompt: leave it out", "only answers are trained"]),
        ("test_batches: 500", ["test_batches: leave it out", "whole test split"]),
        ("lora_parameters: {keys: [self_attn.q_proj], rank: 8}", ["keys: write targets: some of q,k,v,o"]),
        ("lr_schedule: {name: cosine_decay}", ["lr_schedule: write schedule: cosine"]),
        ("clear_cache_threshold: 3", ["clear_cache_threshold: leave it out"]),
        ("wandb: name", ["wandb: write report_to: wandb"]),
        ("hf_dataset: {name: x}", ["hf_dataset: save the data set as files"]),
        ("prompt_feature: question", ["prompt_feature: write field: NAME=COLUMN"]),
        ("lora_layers: 4", ["lora_layers: write num_layers"]),
    ],
)
def test_keys_of_mlx_lm_are_answered(text, says, yaml_file):
    with pytest.raises(SettingError, match="unknown options") as caught:
        read_settings(yaml_file(text))
    for part in says:
        assert part in str(caught.value)


def test_keys_of_mlx_lm_that_ask_for_what_happens_anyway_are_taken(yaml_file):
    assert read_settings(yaml_file("mask_prompt: true\ntest_batches: -1\niters: 3")) == {"iters": 3}


@pytest.mark.parametrize("name", ["mask_prompts", "test_batch", "rate", "steps_per_save", "qwerty"])
def test_a_name_is_suggested_only_if_it_is_a_misspelling(name, yaml_file):
    with pytest.raises(SettingError) as caught:
        read_settings(yaml_file(f"{name}: 1"))
    assert "is it" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["rate_factors: {lora_b: x}", "optimizer_config: {adamw: 3}", "iters: [1]", "itres: 3", "rank: 0", "seed: -1"],
)
def test_a_wrong_value_in_a_file_is_wrong_usage(text, yaml_file, cli, model_folder, data_folder):
    ran = cli("lora", "--train", "--model", model_folder, "--data", data_folder, "-c", yaml_file(text))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("mlx-afm: ")
    assert "Traceback" not in ran.err


def test_optimizer_settings_flat_or_as_mlx_lm_has_them(yaml_file):
    flat = yaml_file("optimizer: sgd\noptimizer_config: {momentum: 0.9}\nno_decay: a, b\nloraplus_ratio: 16")
    train = request_from(flat, PLACES).job.train
    assert (train.optimizer, train.optimizer_config) == ("sgd", {"momentum": 0.9})
    assert (train.no_decay, train.rate_factors) == (("a", "b"), {"lora_b": 16})
    nested = yaml_file("optimizer_config: {adamw: {betas: [0.9, 0.98], eps: 1e-6}, sgd: {}}")
    assert request_from(nested, PLACES).job.train.optimizer_config == {"betas": [0.9, 0.98], "eps": 1e-6}
    assert request_from(nested, {**PLACES, "optimizer": "muon"}).job.train.optimizer_config == {}


def test_the_rest_of_a_run(yaml_file):
    file = yaml_file("sample_prompt: one, two\nreport_to: wandb, swanlab\nresume: true\nproject_name: p")
    request = request_from(file, {**PLACES, "sample_prompt": (), "sample_tokens": 5})
    job = request.job
    assert (request.train, job.resume) == (True, True)
    assert (job.sample_prompts, job.sample_tokens) == (("one, two",), 5)
    assert (job.report_to, job.project_name) == (("wandb", "swanlab"), "p")
    again = request_from(file, {**PLACES, "sample_prompt": ("a", "b"), "resume_adapter_file": Path("x.pt")}).job
    assert (again.sample_prompts, again.resume_adapter_file) == (("a", "b"), Path("x.pt"))
