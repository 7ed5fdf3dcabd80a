"""Options of version 0.1.0 that have other names now: they work, and say so once."""

import pytest

from mlx_afm_cli.parameters import RENAMED

LINE = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(LINE * 2)
    return path


@pytest.mark.parametrize("form", [["--dialect", "prompt-completion"], ["--dialect=prompt-completion"]])
def test_an_old_name_does_what_the_new_one_does(cli, data, form):
    done = cli("data", "check", data, *form)
    assert done.code == 0
    assert done.err.count("--dialect is now --data-format") == 1
    assert cli("data", "check", data, "--dialect", "sharegpt").code == 3


def test_an_old_name_as_a_value_is_a_value(cli, data, tmp_path):
    target = tmp_path / "out.jsonl"
    done = cli("data", "convert", data, target, "--field", "prompt=dialect")
    assert "is now" not in done.err


def test_no_help_shows_an_old_name(cli):
    for line in (("data", "check"), ("lora",), ("export",)):
        text = cli(*line, "--help").out
        assert not [name for name in RENAMED if f"--{name}" in text]


def test_a_file_of_settings_may_have_an_old_key(cli, data, model_folder, tmp_path):
    settings = tmp_path / "lora.yaml"
    settings.write_text(f"model: {model_folder}\ndata: {data}\noverflow: shorten\n")
    done = cli("estimate", "-c", settings)
    assert done.code == 2
    assert "--overflow is now --truncation" in done.err
    assert "truncation: expected one of error, drop" in done.err
    settings.write_text(f"model: {model_folder}\ndata: {data}\noverflow: drop\ntruncation: drop\n")
    assert "an option under its old and its new name" in cli("estimate", "-c", settings).err
