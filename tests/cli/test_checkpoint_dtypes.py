"""Checkpoints in 16 bits: what the model computes with are the numbers that were stored, in every form and direction.

Every float tensor of the bundled model (weights, norms, observers' ranges, adapter) is cast. The reference is a float32
checkpoint of the same rounded numbers, and formulas that are written out here.
"""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_afm
from mlx_afm.adapters import adapter_weights
from mlx_afm.checkpoints import mlx_checkpoint, quantized
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import read_torch, write_torch
from torch_builders import dictionary, legacy_checkpoint, tensor

DTYPES = ("float32", "float16", "bfloat16")
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
ALIAS, TABLE = "output_transform.weight", "embedding.weight"
STEP = "model.layers.0.self_attn.quant_key_scale"
RANGE = "layers.segment_0.layer_0.attention.kv_quantizer.key_quantizer.activation_post_process.range"


def rounded(array, dtype):
    """Float32 numbers rounded to a dtype by MLX."""
    return np.array(mx.array(array).astype(getattr(mx, dtype)).astype(mx.float32))


def stored(array, dtype):
    """The tensor of a file that holds float32 numbers in a dtype."""
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16).reshape(array.shape)
        return LazyTensor("bfloat16", array.shape, lambda: bits)
    return LazyTensor.of(array.astype(dtype))


@pytest.fixture(scope="module")
def numbers(toolkit_folder):
    """The bundled checkpoint with an adapter that does something: float32 numbers by the toolkit's names."""
    rng = np.random.default_rng(5)
    arrays = {name: np.array(t.read_stored()) for name, t in read_torch(toolkit_folder / "base-model.pt").items()}
    del arrays[ALIAS]
    for name, array in arrays.items():
        if name.endswith("b_transpose"):
            arrays[name] = (0.1 * rng.standard_normal(array.shape)).astype(np.float32)
    return arrays


@pytest.fixture
def write_checkpoint(toolkit_folder, tmp_path, numbers):
    """A function that writes a toolkit folder whose floats are rounded to `values` and stored as `dtype`."""

    def write(name, dtype, form="zip", values=None):
        floats = {k: rounded(a, values or dtype) if a.dtype == np.float32 else a for k, a in numbers.items()}
        tensors = {k: stored(a, dtype) if a.dtype == np.float32 else LazyTensor.of(a) for k, a in floats.items()}
        folder = tmp_path / name
        folder.mkdir()
        for file in ("base-model-config.json", "tokenizer.model"):
            shutil.copyfile(toolkit_folder / file, folder / file)
        path = folder / "base-model.pt"
        if form == "zip":
            write_torch(path, tensors, aliases={ALIAS: TABLE})
        else:
            path.write_bytes(legacy(tensors))
        return folder

    return write


def legacy(tensors):
    """A checkpoint in torch's form of before its zip files."""
    keys = {name: str(number) for number, name in enumerate(tensors)}
    bodies, storages = {}, {}
    for name, item in [*tensors.items(), (ALIAS, tensors[TABLE])]:
        key, strides = keys.get(name, keys[TABLE]), np.cumprod([1, *item.shape[:0:-1]])[::-1][: len(item.shape)]
        shape, kind = tuple(map(int, item.shape)), STORAGES[item.dtype]
        bodies[name] = tensor(kind, key, item.size, 0, shape, tuple(map(int, strides)), legacy=True)
        storages[key] = (item.size, item.read_stored().tobytes())
    return legacy_checkpoint(dictionary(**bodies), storages)


def computed_with(folder):
    """All numbers that a model folder computes with, its own adapter included, as float32."""
    model, _ = mlx_afm.load(folder)
    arrays = {**dict(tree_flatten(model.parameters())), **adapter_weights(model)}
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


def same(one, two):
    assert one.keys() == two.keys()
    wrong = [name for name in one if not np.array_equal(one[name], two[name])]
    assert not wrong


def bits(path):
    return {n: (t.dtype, t.shape, t.read_stored().tobytes()) for n, t in read_torch(path / "base-model.pt").items()}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_toolkit_checkpoint_of_any_dtype_there_and_back(dtype, form, write_checkpoint, numbers, tmp_path, cli):
    source = write_checkpoint("source", dtype, form)
    reference = write_checkpoint("reference", "float32", values=dtype)
    told = cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "mlx", "--verify", "--json").json
    assert (told["base_adapter"], told["verified"]) == ("active", True)
    assert cli("convert", "--hf-path", reference, "--mlx-path", tmp_path / "wide").code == 0
    found = computed_with(tmp_path / "mlx")
    same(found, computed_with(tmp_path / "wide"))
    low, high = rounded(numbers[RANGE], dtype)
    assert found[STEP] == pytest.approx(max(-low / 128, high / 127), rel=1e-6)
    back = ("--hf-path", tmp_path / "mlx", "--to", "torch", "--mlx-path", tmp_path / "back", "--verify", "--json")
    assert cli("convert", *back).json["verified"] is True
    assert bits(tmp_path / "back") == bits(source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_mlx_folder_of_any_dtype_goes_both_ways(dtype, write_checkpoint, tmp_path, cli):
    """Every float array of a folder in one dtype, quantizer steps and adapter too, and no observers beside them."""
    cli("convert", "--hf-path", write_checkpoint("source", "float32"), "--mlx-path", tmp_path / "mlx")
    (tmp_path / "mlx" / "toolkit" / "observers.safetensors").unlink()
    for file in ("model.safetensors", "base_adapter/adapters.safetensors"):
        arrays = {
            name: array.astype(getattr(mx, dtype)) for name, array in mx.load(str(tmp_path / "mlx" / file)).items()
        }
        mx.save_safetensors(str(tmp_path / "mlx" / file), arrays)
    wanted = computed_with(tmp_path / "mlx")
    again = ("--mlx-path", tmp_path / "again", "--dtype", dtype, "--verify", "--json")
    assert cli("convert", "--hf-path", tmp_path / "mlx", *again).json["verified"] is True
    same(computed_with(tmp_path / "again"), wanted)
    back = ("--to", "torch", "--out", tmp_path / "pt", "--verify")
    assert cli("convert", "--hf-path", tmp_path / "mlx", *back).code == 0
    state = read_torch(tmp_path / "pt" / "base-model.pt")
    low, high = state[RANGE].read_values()
    assert max(-low / 128, high / 127) == pytest.approx(float(wanted[STEP]), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_of_16_bits_keeps_its_numbers_in_every_form(dtype, numbers, model_folder, tmp_path, cli, say):
    """A toolkit .pt in 16 bits, as folder and as package, also padded to the rank of devices."""
    pairs = {name: rounded(array, dtype) for name, array in numbers.items() if "adapter" in name}
    write_torch(tmp_path / "narrow.pt", {name: stored(array, dtype) for name, array in pairs.items()})
    write_torch(tmp_path / "wide.pt", {name: LazyTensor.of(array) for name, array in pairs.items()})
    for name in ("narrow", "wide"):
        path = tmp_path / f"{name}.pt"
        for target in (tmp_path / name, tmp_path / f"{name}.fmadapter"):
            ran = cli("adapter", "convert", path, target, "--model", model_folder)
            assert ran.code == 0, ran.err
    for form in ("", ".fmadapter"):
        answers = [say("--adapter-path", tmp_path / f"{name}{form}") for name in ("narrow", "wide")]
        assert answers[0] == answers[1]
    packages = [tmp_path / f"{name}.fmadapter" / "adapter_weights.bin" for name in ("narrow", "wide")]
    assert packages[0].read_bytes() == packages[1].read_bytes()


@pytest.mark.parametrize("place", ["step", "range"])
def test_verify_notices_a_wrong_derived_value(place, write_checkpoint, tmp_path, cli, monkeypatch):
    """The step of layer 0's keys, or the range that stands for it, made wrong where it is derived."""
    source = write_checkpoint("source", "float32")
    if place == "step":
        right = mlx_checkpoint.quantizer_scale
        monkeypatch.setattr(mlx_checkpoint, "quantizer_scale", lambda *a, **k: right(*a, **k) * np.float32(1.01))
        ran = cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "mlx", "--verify")
    else:
        cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "plain")
        (tmp_path / "plain" / "toolkit" / "observers.safetensors").unlink()
        right = mlx_checkpoint.range_of_scale
        monkeypatch.setattr(mlx_checkpoint, "range_of_scale", lambda *a, **k: right(*a, **k) * np.float32(1.01))
        ran = cli("convert", "--hf-path", tmp_path / "plain", "--to", "torch", "--out", tmp_path / "mlx", "--verify")
    assert ran.code == 1
    assert STEP in ran.err
    assert "observers do not imply" in ran.err
    assert not (tmp_path / "mlx").exists()


def test_verify_notices_wrong_balanced_codes(model_folder, tmp_path, cli, monkeypatch):
    right = quantized.quantize_balanced
    options = ("-q", "--q-mode", "balanced", "--verify")
    ran = cli("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "q", *options)
    assert ran.code == 0, ran.err

    def wrong(*arguments, **options):
        done = right(*arguments, **options)
        return type(done)(done.codes_ON ^ np.uint8(3), done.scales_O, done.exact_O)

    monkeypatch.setattr(quantized, "quantize_balanced", wrong)
    ran = cli("convert", "--hf-path", model_folder, "--mlx-path", tmp_path / "x", *options)
    assert ran.code == 1
    assert "quantized matrices that are not near their weights" in ran.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parity
@pytest.mark.parametrize("new_form", [True, False])
def test_what_torch_itself_saves_in_bfloat16(new_form, write_checkpoint, tmp_path, cli):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    source = write_checkpoint("source", "float32")
    state = torch.load(source / "base-model.pt", weights_only=True)
    halves = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in state.items()}
    torch.save(halves, source / "base-model.pt", _use_new_zipfile_serialization=new_form)
    wide = tmp_path / "wide-source"
    shutil.copytree(source, wide)
    torch.save({name: t.float() if t.is_floating_point() else t for name, t in halves.items()}, wide / "base-model.pt")
    for name, path in (("mlx", source), ("wide", wide)):
        ran = cli("convert", "--hf-path", path, "--mlx-path", tmp_path / name, "--verify")
        assert ran.code == 0, ran.err
    same(computed_with(tmp_path / "mlx"), computed_with(tmp_path / "wide"))
