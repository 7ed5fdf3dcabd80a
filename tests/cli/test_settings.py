from dataclasses import asdict
from pathlib import Path

import click
import pytest

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError
from mlx_afm.training import TrainConfig
from mlx_afm_cli.settings import KNOWN, TYPES, read_settings, request_from

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
    assert (job.adapter_path, job.name, job.max_tokens) == (Path("adapters"), None, 4096)
    assert (request.train, request.test, request.adapter_given) == (False, False, False)


def test_defaults_then_file_then_flags(yaml_file):
    file = yaml_file("model: m\ndata: d\niters: 7\nseed: 3\nmax_seq_length: 99\nname: tidy\ntest: true\n")
    request = request_from(file, {"iters": 2, "data": Path("elsewhere"), "seed": None})
    job = request.job
    assert (job.train.iters, job.train.seed, job.train.batch_size) == (2, 3, TrainConfig().batch_size)
    assert (job.model, job.data, job.max_tokens, job.name) == (Path("m"), Path("elsewhere"), 99, "tidy")
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
        ("lora_parameters: {rank: 8, alpha: 16}", ["unknown options", "alpha"]),
        ("lora_parameters: 8", ["lora_parameters is not a mapping", "expected rank, scale, dropout, found 8"]),
        ("iters: 2.5\nbatch_size: four", ["iters: expected a whole number, found 2.5", "found 'four'"]),
        ("learning_rate: fast\nwarmup: [1]", ["learning_rate: expected a number, found 'fast'", "found [1]"]),
        ("seed: true", ["seed: expected a whole number, found True"]),
        ("train: 'false'", ["train: expected true or false, found 'false'"]),
        ("targets: 3", ["targets: expected a list of names", "found 3"]),
        ("model: 3\nadapter_path: [a]", ["model: expected text, found 3", "adapter_path: expected text"]),
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
