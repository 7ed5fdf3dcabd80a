import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm import load
from mlx_afm.checkpoints.arrays import cast
from mlx_afm.checkpoints.names import count_layers
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.torch_file import read_torch, write_torch
from mlx_afm.workflows.demo import ASSETS

TOOLKIT_FILES = ("base-model.pt", "base-model-config.json", "tokenizer.model")


def bits(tensor):
    return tensor.dtype, tensor.shape, np.ascontiguousarray(tensor.read_stored()).tobytes()


def test_the_model_folder_holds_the_weights_of_the_checkpoint(model_folder):
    wanted, found = (
        read_safetensors(ASSETS / "base-model.safetensors"),
        mx.load(str(model_folder / "model.safetensors")),
    )
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(found[name]), cast(tensor, "float32").read_values())


@pytest.mark.parametrize("form", ["toolkit", "assets", "pt"])
def test_every_form_of_the_source_gives_the_same_folder(form, toolkit_folder, model_folder, tmp_path, cli):
    source = {"toolkit": toolkit_folder.parent, "assets": toolkit_folder, "pt": toolkit_folder / "base-model.pt"}[form]
    told = cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "out", "--json").json
    out = str(tmp_path / "out")
    assert told == {
        "folder": out, "form": "mlx", "tensors": 62, "bytes": 2948960, "base_adapter": "zero", "verified": False,
        "wrapper_key": None, "bits_per_weight": 32.0, "quantized": {}, "on_grid": 0, "left_dense": [],
            "init_errors": {},
    }  # fmt: skip
    files = {path.relative_to(model_folder) for path in model_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (model_folder / file).read_bytes()


def test_the_config_is_in_mlx_lms_keys(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    assert config["model_type"] == "afm7"
    assert config["tie_word_embeddings"] is True
    assert (config["hidden_dim"], config["num_layers"], config["num_kv_reuse_layers"]) == (96, 6, 2)


def test_the_default_target_is_mlx_lms(toolkit_folder, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    assert cli("convert", "--hf-path", toolkit_folder, "--json").json["folder"] == "mlx_model"
    assert (tmp_path / "mlx_model" / "config.json").is_file()


def test_an_empty_target_is_used(toolkit_folder, tmp_path, cli):
    (tmp_path / "out").mkdir()
    assert cli("convert", "--hf-path", toolkit_folder, "--mlx-path", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_a_tokenizer_only_on_request_and_then_it_is_none(
    toolkit_folder, tmp_path, copy_of, expect_refusal, cli
):
    source = copy_of(toolkit_folder)
    (source / "tokenizer.model").unlink()
    expect_refusal("convert", "--hf-path", source, "--mlx-path", tmp_path / "out",
            says=[source, "missing tokenizer.model", "--no-tokenizer"])  # fmt: skip
    assert cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "out", "--no-tokenizer").code == 0
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer is None
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 512)


@pytest.mark.parametrize("option", ["--out", "--mlx-path"])
def test_back_to_torch_is_bit_for_bit(option, toolkit_folder, model_folder, tmp_path, cli):
    told = cli("convert", "--hf-path", model_folder, "--to", "torch", option, tmp_path / "back", "--json").json
    assert (told["form"], told["base_adapter"]) == ("torch", "zero")
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(TOOLKIT_FILES)
    for name in TOOLKIT_FILES[1:]:
        assert (tmp_path / "back" / name).read_bytes() == (toolkit_folder / name).read_bytes()
    before, after = read_torch(toolkit_folder / "base-model.pt"), read_torch(tmp_path / "back" / "base-model.pt")
    assert list(before) == list(after)
    assert {name: bits(tensor) for name, tensor in before.items()} == {n: bits(t) for n, t in after.items()}


def test_dtype_casts_weights_but_no_quantizer_step_and_no_adapter(toolkit_folder, tmp_path, cli):
    assert cli("convert", "--hf-path", toolkit_folder, "--mlx-path", tmp_path / "out", "--dtype", "bfloat16").code == 0
    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")
    dtypes = {name.endswith("_scale"): set() for name in tensors}
    for name, tensor in tensors.items():
        dtypes[name.endswith("_scale")].add(tensor.dtype)
    assert dtypes == {True: {"float32"}, False: {"bfloat16"}}
    adapter = read_safetensors(tmp_path / "out" / "base_adapter" / "adapters.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {"float32"}
    assert count_layers(list(adapter)) == (4, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_a_base_with_an_active_adapter_keeps_it(toolkit_folder, adapter_forms, tmp_path, copy_of, cli, say):
    source = copy_of(toolkit_folder)
    state = {**read_torch(toolkit_folder / "base-model.pt"), **read_torch(adapter_forms["pt"])}
    head = state.pop("output_transform.weight")
    assert bits(head) == bits(state["embedding.weight"])
    write_torch(source / "base-model.pt", state, aliases={"output_transform.weight": "embedding.weight"})
    ran = cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "out", "--json")
    assert ran.json["base_adapter"] == "active"
    assert "adapter that is not zero" in ran.err
    assert say(model=tmp_path / "out") == say("--adapter-path", adapter_forms["folder"])
    assert cli("fuse", "--model", tmp_path / "out", "--save-path", tmp_path / "fused").code == 0
    assert say(model=tmp_path / "fused") == say("--adapter-path", adapter_forms["folder"])
