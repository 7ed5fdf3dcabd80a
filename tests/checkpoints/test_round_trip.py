"""Torch checkpoint -> MLX folder -> torch checkpoint: bit for bit, and loadable where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_afm import convert, load
from mlx_afm.checkpoints.toolkit import quantizer_scale, range_of_scale
from mlx_afm.errors import ConfigError, FormatError, TensorsError
from mlx_afm.formats.torch_file import read_torch, write_torch
from tolerances import SAME_ARITHMETIC

ORACLES = Path(__file__).parent.parent / "fixtures" / "oracle"
NAMES = ["default", "default-plain", "heads", "uniform", "uniform-plain"]


def same_tensors(first: Path, second: Path) -> None:
    one, two = read_torch(first), read_torch(second)
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert tensor.read_stored().tobytes() == two[name].read_stored().tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_identical(name, tmp_path):
    source = ORACLES / name
    convert(source, tmp_path / "mlx", no_tokenizer=True)
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    same_tensors(source / "base-model.pt", tmp_path / "torch" / "base-model.pt")
    config = "base-model-config.json"
    assert (tmp_path / "torch" / config).read_bytes() == (source / config).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_rounds_to_nearest_even_and_spares_quantizers_and_adapters(dtype, tmp_path):
    convert(ORACLES / "default", tmp_path / "mlx", dtype=dtype, no_tokenizer=True)
    model, tokenizer = load(tmp_path / "mlx")
    assert tokenizer is None
    original = read_torch(ORACLES / "default" / "base-model.pt")
    weights = dict(tree_flatten(model.parameters()))
    ours, theirs = (
        "model.layers.1.mlp.up_proj.weight",
        "layers.segment_0.layer_1.feed_forward.hidden_transform.linear_1",
    )
    expected = mx.array(original[f"{theirs}.wrapped.weight"].read_values()).astype(getattr(mx, dtype))
    assert mx.array_equal(weights[ours], expected)
    assert weights["model.layers.0.self_attn.quant_key_scale"].dtype == mx.float32
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    back = read_torch(tmp_path / "torch" / "base-model.pt")
    assert {tensor.dtype for name, tensor in back.items() if "adapter" in name} == {"float32"}
    assert {tensor.dtype for name, tensor in back.items() if name.endswith("norm.weight")} == {dtype}


def test_a_folder_that_never_was_a_toolkit_folder_can_go_back(tmp_path):
    convert(ORACLES / "default", tmp_path / "mlx", no_tokenizer=True)
    import shutil

    shutil.rmtree(tmp_path / "mlx" / "toolkit")
    shutil.rmtree(tmp_path / "mlx" / "base_adapter")
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    convert(tmp_path / "torch", tmp_path / "again", no_tokenizer=True)
    tokens = mx.arange(1, 9)[None]
    assert mx.array_equal(load(tmp_path / "mlx")[0](tokens), load(tmp_path / "again")[0](tokens))


def test_an_active_base_adapter_stays_active(tmp_path):
    """A base whose own adapter is not zero computes with it, and starts training from it."""
    source, config = tmp_path / "source", "base-model-config.json"
    source.mkdir()
    tensors = {
        **read_torch(ORACLES / "default" / "base-model.pt"),
        **read_torch(ORACLES / "default" / "adapter-final.pt"),
    }
    tensors.pop("output_transform.weight")
    write_torch(source / "base-model.pt", tensors, aliases={"output_transform.weight": "embedding.weight"})
    (source / config).write_bytes((ORACLES / "default" / config).read_bytes())
    assert convert(source, tmp_path / "mlx", no_tokenizer=True).base_adapter == "active"
    with np.load(ORACLES / "default" / "logits.npz") as arrays:
        tokens, wanted = mx.array(arrays["input_ids"].astype(np.int32)), arrays["logits_adapter"]
    model, _ = load(tmp_path / "mlx")
    assert np.abs(np.array(model(tokens)) - wanted).max() <= 1e-2
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    same_tensors(source / "base-model.pt", tmp_path / "torch" / "base-model.pt")


@pytest.mark.parametrize("scale", [1e-6, 0.0117, 0.02362, 1.0, 3.3])
def test_ranges_and_steps_are_inverse(scale):
    step = np.float32(scale)
    assert quantizer_scale(range_of_scale(step)) == step
    assert quantizer_scale(np.array([-2.56, 1.0], np.float32)) == np.float32(2.56) * np.float32(1 / 128)
    assert quantizer_scale(np.array([-1.0, 2.54], np.float32)) == np.float32(2.54) * np.float32(1 / 127)


def test_an_empty_range_is_refused():
    with pytest.raises(ConfigError, match="without a usable range"):
        quantizer_scale(np.zeros(2, np.float32))


def damaged(tmp_path: Path, change) -> Path:
    tensors = read_torch(ORACLES / "default" / "base-model.pt")
    change(tensors)
    source = tmp_path / "source"
    source.mkdir()
    write_torch(source / "base-model.pt", tensors)
    name = "base-model-config.json"
    (source / name).write_bytes((ORACLES / "default" / name).read_bytes())
    return source


def test_missing_surplus_and_misshaped_tensors_are_listed_together(tmp_path):
    def change(tensors):
        tensors["layers.extra"] = tensors.pop("output_norm.weight")
        tensors["layers.segment_0.layer_0.attention.norm.weight"] = tensors["embedding.weight"]

    with pytest.raises(TensorsError) as error:
        convert(damaged(tmp_path, change), tmp_path / "mlx", no_tokenizer=True)
    message = str(error.value)
    assert "missing: output_norm.weight, shape (32,)" in message
    assert "surplus: layers.extra" in message
    assert "wrong shape: layers.segment_0.layer_0.attention.norm.weight: expected (32,), found (80, 32)" in message
    assert not (tmp_path / "mlx").exists()


def test_a_head_of_its_own_is_refused(tmp_path):
    from mlx_afm.formats.tensors import LazyTensor

    def change(tensors):
        tensors["output_transform.weight"] = LazyTensor.of(tensors["embedding.weight"].read_values() + np.float32(1))

    with pytest.raises(TensorsError, match=r"output_transform.weight is not embedding.weight"):
        convert(damaged(tmp_path, change), tmp_path / "mlx", no_tokenizer=True)


def test_what_stands_in_the_way_is_refused_and_left_alone(tmp_path):
    target = tmp_path / "mlx"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        convert(ORACLES / "default", target, no_tokenizer=True)
    assert (target / "precious.txt").read_text() == "mine"
    with pytest.raises(FormatError, match=r"missing tokenizer.model"):
        convert(ORACLES / "default", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_mlx_folder_can_be_cast(tmp_path):
    convert(ORACLES / "default", tmp_path / "wide", no_tokenizer=True)
    convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16", verify=True)
    convert(ORACLES / "default", tmp_path / "direct", dtype="bfloat16", no_tokenizer=True)
    files = sorted(path.relative_to(tmp_path / "direct") for path in (tmp_path / "direct").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "narrow") for p in (tmp_path / "narrow").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "narrow" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes(), file


@pytest.mark.parametrize("to", ["mlx", "torch"])
def test_progress_counts_every_byte_and_verification_reads_back(to, tmp_path):
    source = ORACLES / "default"
    if to == "torch":
        source = convert(source, tmp_path / "mlx", no_tokenizer=True).folder
    told = []
    done = convert(
        source, tmp_path / "out", to=to, no_tokenizer=True, verify=True, on_progress=lambda *sizes: told.append(sizes)
    )
    assert done.verified
    assert told[-1] == (done.bytes, done.bytes)
    assert [count for count, _ in told] == sorted(count for count, _ in told)


def test_verification_finds_a_flipped_bit(tmp_path, monkeypatch):
    from mlx_afm.formats import mlx_folder

    write = mlx_folder.write_safetensors

    def write_badly(path, *arguments):
        write(path, *arguments)
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(mlx_folder, "write_safetensors", write_badly)
    with pytest.raises(TensorsError, match=r"not what was read.*\n  model.output_norm.weight: other"):
        convert(ORACLES / "default", tmp_path / "out", no_tokenizer=True, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(ConfigError, match=r"not enough disk space \(expected 0.07 GB free, found 0.00 GB\)"):
        convert(ORACLES / "default", tmp_path / "out", no_tokenizer=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lone_checkpoint_with_its_json_elsewhere(tmp_path):
    import shutil

    lone, config = tmp_path / "weights.pt", tmp_path / "elsewhere.json"
    shutil.copyfile(ORACLES / "uniform" / "base-model.pt", lone)
    shutil.copyfile(ORACLES / "uniform" / "base-model-config.json", config)
    with pytest.raises(FormatError, match=r"missing weights-config.json"):
        convert(lone, tmp_path / "out", no_tokenizer=True)
    assert convert(lone, tmp_path / "out", config=config, no_tokenizer=True).tensors > 0


def test_a_draft_model_folder(tmp_path):
    """The toolkit's draft model lies beside the base model, without quantizers and without adapters."""
    from mlx_afm.checkpoints.names import plan_names
    from mlx_afm.formats.tensors import LazyTensor
    from mlx_afm.model import parse_toolkit_config

    document = {"__tamm_type__": "models:AFMTextV7Config", "hidden_dim": 32, "hidden_dim_scale_factor": 3.0,
                "num_heads": 4, "num_kv_heads": 4, "num_kv_reuse_layers": 0, "num_layers": 2,
                "vocab_size": 40}  # fmt: skip
    rng = np.random.default_rng(0)
    entries = plan_names(parse_toolkit_config(document, where="x"))[:-1]
    state = {e.toolkit: LazyTensor.of(rng.standard_normal(e.shape).astype(np.float32)) for e in entries}
    folder = tmp_path / "assets"
    folder.mkdir()
    write_torch(folder / "draft-model.pt", state, aliases={"output_transform.weight": "embedding.weight"})
    (folder / "draft-model-config.json").write_text(json.dumps(document))
    done = convert(folder, tmp_path / "draft", no_tokenizer=True)
    assert done.base_adapter == "none"
    model, _ = load(tmp_path / "draft")
    assert len(model.make_cache()) == len(model.layers) == 2
    assert not model.args.kv_quant


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="nobody/nothing: no such folder, and no repository"):
        load("nobody/nothing")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["default", "uniform"])
def test_the_reference_loads_what_comes_back_strictly(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    tamm_json = pytest.importorskip("tamm.utils.json", reason="the parity extra is not installed")
    source = ORACLES / name
    convert(source, tmp_path / "mlx", no_tokenizer=True)
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    model = tamm_json.loads((tmp_path / "torch" / "base-model-config.json").read_text()).create_model().eval()
    state = torch.load(tmp_path / "torch" / "base-model.pt", weights_only=True)
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    original = torch.load(source / "base-model.pt", weights_only=True)
    assert all(torch.equal(original[key], value) for key, value in state.items())
    with np.load(source / "logits.npz") as arrays, torch.no_grad():
        wanted = arrays["logits_base"]
        logits = model(torch.from_numpy(arrays["input_ids"])).logits.numpy()
    # The weights are equal bit for bit and its own adapter has B = 0. 1.9e-6 was measured, presumably since the fixture
    # was made on another processor, whose matrix products sum in another order.
    assert np.abs(logits - wanted).max() < SAME_ARITHMETIC


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_in_a_larger_checkpoint_of_either_form(legacy, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    name = "base-model-config.json"
    state = torch.load(ORACLES / "default" / "base-model.pt", weights_only=True)
    larger = {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1, "state": {}}}
    source = tmp_path / "source"
    source.mkdir()
    torch.save(larger, source / "base-model.pt", _use_new_zipfile_serialization=not legacy)
    (source / name).write_bytes((ORACLES / "default" / name).read_bytes())
    assert convert(source, tmp_path / "mlx", no_tokenizer=True).wrapper_key == "state_dict"
    convert(tmp_path / "mlx", tmp_path / "torch", to="torch")
    same_tensors(ORACLES / "default" / "base-model.pt", tmp_path / "torch" / "base-model.pt")
