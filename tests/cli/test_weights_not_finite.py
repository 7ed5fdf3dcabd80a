"""NaN and infinite weights are refused by tensor name wherever weights are loaded; a run that diverges is an error."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_afm
from mlx_afm.errors import TensorsError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch, write_torch

NAME = "model.layers.0.mlp.up_proj.lora_b"
THEIRS = "layers.segment_0.layer_0.feed_forward.hidden_transform.linear_1.adapters.base_adapter.b_transpose"
NORM = "model.layers.1.post_attention_layernorm.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"


def spoil(file, name, value=float("nan"), dtype=None):
    """Makes two values of an array in a safetensors file not finite."""
    arrays = mx.load(str(file))
    flat = np.array(arrays[name].astype(mx.float32)).reshape(-1)
    flat[:2] = value
    arrays[name] = mx.array(flat.reshape(arrays[name].shape)).astype(arrays[name].dtype)
    if dtype is not None:
        arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})


@pytest.fixture
def bad_adapters(adapter_forms, copy_of):
    """An adapter with NaN in one tensor, in the three forms, and what each calls that tensor."""
    folder = copy_of(adapter_forms["folder"], "bad")
    spoil(folder / "adapters.safetensors", NAME)
    tensors, pt = read_torch(adapter_forms["pt"]), folder.parent / "bad.pt"
    array = np.array(tensors[THEIRS].read_values())
    array.reshape(-1)[:2] = np.inf
    write_torch(pt, {**tensors, THEIRS: LazyTensor.of(array)})
    package = copy_of(adapter_forms["fmadapter"], "bad.fmadapter")
    weights = bytearray((package / "adapter_weights.bin").read_bytes())
    weights[-2:] = np.array(np.nan, "<f2").tobytes()  # the last value of the last record
    (package / "adapter_weights.bin").write_bytes(weights)
    return {"folder": (folder, NAME), "pt": (pt, NAME), "fmadapter": (package, "model.kv_reuse_layers.1.mlp.down_proj")}


@pytest.mark.parametrize("form", ["folder", "pt", "fmadapter"])
def test_no_command_uses_an_adapter_that_is_not_finite(form, bad_adapters, model_folder, data_folder, tmp_path, cli):
    adapter, name = bad_adapters[form]
    before = set(tmp_path.rglob("*"))
    commands = [
        ("generate", "--model", model_folder, "--adapter-path", adapter, "--prompt", "hi"),
        ("fuse", "--model", model_folder, "--adapter-path", adapter, "--save-path", tmp_path / "fused"),
        ("export", "--adapter-path", adapter, "--model", model_folder, "--name", "x", "--output-dir", tmp_path / "x"),
        ("adapter", "convert", adapter, tmp_path / "copy", "--model", model_folder),
        ("lora", "--test", "--model", model_folder, "--adapter-path", adapter, "--data", data_folder),
        ("serve", "--model", model_folder, "--adapter", f"bad={adapter}", "--port", "0"),
        (
            *("lora", "--train", "--model", model_folder, "--data", data_folder, "--iters", "1"),
            *("--resume-adapter-file", adapter, "--adapter-path", tmp_path / "run"),
        ),
    ]
    for command in commands:
        ran = cli(*command)
        assert ran.code == 1, (command, ran.out, ran.err)
        assert "not finite (NaN or infinite)" in ran.err, (command, ran.err)
        assert name in ran.err, (command, ran.err)
        assert ran.err.count("mlx-afm: ") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [NORM, MATRIX, "model.layers.0.self_attn.quant_key_scale"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_folder_that_is_not_finite_is_refused(name, dtype, model_folder, copy_of, tmp_path, cli):
    folder = copy_of(model_folder, "bad")
    spoil(folder / "model.safetensors", name, float("-inf"), getattr(mx, dtype))
    with pytest.raises(TensorsError, match=rf"not finite[^\n]*\n +{name}: \d+ of"):
        mlx_afm.load(folder)
    if name != MATRIX:
        with pytest.raises(TensorsError, match=name):
            mlx_afm.load(folder, lazy=True)
    ran = cli("generate", "--model", model_folder, "--draft-model", folder, "--prompt", "hi")
    assert (ran.code, name in ran.err) == (1, True), ran.err
    for options in ((), ("-q",), ("--to", "torch")):
        ran = cli("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", *options)
        assert (ran.code, name in ran.err) == (1, True), (options, ran.err)
        assert not (tmp_path / "out").exists()


def test_a_toolkit_checkpoint_that_is_not_finite_is_refused(toolkit_folder, copy_of, tmp_path, cli):
    folder = copy_of(toolkit_folder, "bad")
    tensors = read_torch(toolkit_folder / "base-model.pt")
    del tensors["output_transform.weight"]
    names = {
        "layers.segment_0.layer_0.attention.norm.weight": "model.layers.0.input_layernorm.weight",
        "layers.segment_0.layer_0.feed_forward.output_transform.adapters.base_adapter.a_transpose": "lora_a",
        "layers.segment_0.layer_0.attention.kv_quantizer.key_quantizer.activation_post_process.range": "key_quantizer",
    }
    for name, ours in names.items():
        array = np.array(tensors[name].read_values())
        array.reshape(-1)[0] = np.nan
        changed = {**tensors, name: LazyTensor.of(array)}
        write_torch(folder / "base-model.pt", changed, aliases={"output_transform.weight": "embedding.weight"})
        ran = cli("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out")
        assert ran.code == 1
        assert ours in ran.err
        assert not (tmp_path / "out").exists()


def test_a_value_that_float16_cannot_hold_is_refused_by_name(model_folder, copy_of, tmp_path, cli):
    folder = copy_of(model_folder, "large")
    spoil(folder / "model.safetensors", MATRIX, 1e5)
    ran = cli("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", "--dtype", "float16")
    assert ran.code == 1
    assert f"{MATRIX}: 2 of" in ran.err
    assert "float16 holds at most 65504" in ran.err
    assert cli("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", "--dtype", "bfloat16").code == 0


def train(cli, model, data, out, *options):
    return cli("lora", "--train", "--model", model, "--data", data, "--adapter-path", out, *options)


@pytest.mark.parametrize("iters", [1, 2, 12])
def test_a_run_that_diverges_is_an_error_and_saves_nothing(iters, model_folder, data_folder, tmp_path, cli):
    data = data_folder / "train.jsonl"  # no validation data, so no best adapter either
    ran = train(cli, model_folder, data, tmp_path / "run", "--iters", iters, "--learning-rate", "1e30", "--warmup", "0")
    assert ran.code == 1
    assert "mlx-afm: the training diverged at step" in ran.err
    assert "No adapter was saved." in ran.err
    assert not (tmp_path / "run" / "adapters.safetensors").exists()


def test_a_run_that_diverges_says_what_it_saved_before(model_folder, data_folder, tmp_path, cli):
    options = ("--iters", "30", "--learning-rate", "1e30", "--steps-per-eval", "2")
    ran = train(cli, model_folder, data_folder, tmp_path / "run", *options)
    assert ran.code == 1
    assert "validation loss is nan" in ran.err
    assert "Saved adapters are intact: best of step 0 (not trained)." in ran.err
    assert not (tmp_path / "run" / "adapters.safetensors").exists()
    arrays = mx.load(str(tmp_path / "run" / "best" / "adapters.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in arrays.values())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert not [line for line in lines if json.loads(line)["event"] == "end"]


def test_a_folder_whose_steps_contradict_its_observers_is_refused(model_folder, copy_of, tmp_path, cli):
    """What an earlier release made of a bfloat16 checkpoint: steps that the observers' ranges do not imply."""
    folder = copy_of(model_folder, "old")
    spoil(folder / "model.safetensors", "model.layers.0.self_attn.quant_key_scale", 129.78)
    for options in ((), ("--to", "torch"), ("--verify",), ("--to", "torch", "--verify")):
        ran = cli("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", *options)
        assert ran.code == 1
        assert "model.layers.0.self_attn.quant_key_scale: expected 0.0" in ran.err
        assert not (tmp_path / "out").exists()
