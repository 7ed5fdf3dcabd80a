"""`mlx-afm cache`: both kinds are listed with their sizes and deleted by name, by age, or all."""

import os

import pytest

from mlx_afm.files import size_of


@pytest.fixture
def cache(cli, model_folder, data_folder, tmp_path, monkeypatch):
    """A cache folder after a run with frozen layers."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLX_AFM_CACHE", str(folder))
    line = ["lora", "--train", "--model", model_folder, "--data", data_folder, "--adapter-path", tmp_path / "run"]
    ran = cli(*line, "--rank", 4, "--num-layers", 2, "--epochs", 2, "--batch-size", 4)
    assert ran.code == 0
    assert "activations are computed once for each example and kept in" in ran.err
    return folder


def test_list(cli, cache):
    told = cli("cache", "list", "--json").json
    assert told["folder"] == str(cache)
    assert sorted(entry["kind"] for entry in told["entries"]) == ["encoded data", "encoded data", "frozen activations"]
    assert told["bytes"] == sum(entry["bytes"] for entry in told["entries"]) == size_of(cache)
    (frozen,) = [entry for entry in told["entries"] if entry["kind"] == "frozen activations"]
    assert frozen["about"] == "24 examples behind 4 layers"
    assert frozen["days"] < 1
    text = cli("cache", "list").out
    assert frozen["name"][:12] in text
    assert "3 entries" in text


def test_clear_by_name(cli, cache):
    entries = cli("cache", "list", "--json").json["entries"]
    name = next(entry["name"] for entry in entries if entry["kind"] == "frozen activations")
    for wrong in ("zz", ""):
        ran = cli("cache", "clear", wrong)
        assert ran.code == 1
        assert "names of no single entry" in ran.err
    assert cli("cache", "clear", name[:10], "--json").json["entries"][0]["name"] == name
    assert len(cli("cache", "list", "--json").json["entries"]) == 2


def test_clear_by_age_and_all(cli, cache):
    assert cli("cache", "clear", "--older-than", 1, "--json").json["entries"] == []
    store = next((cache / "frozen").iterdir())
    for path in store.iterdir():
        os.utime(path, (0, 0))
    assert [entry["name"] for entry in cli("cache", "clear", "--older-than", 1, "--json").json["entries"]] == [
        store.name
    ]
    assert len(cli("cache", "clear", "--json").json["entries"]) == 2
    assert size_of(cache) == 0
    assert cli("cache", "list").out.endswith("0 entries, 0.00 MB\n")
