"""Adapters on disk: three forms, the same values, and adapters that do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.adapters import (
    Adapter,
    LoRAConfig,
    adapter_weights,
    attach_adapter,
    is_zero,
    read_adapter,
    write_adapter_folder,
    write_adapter_package,
    write_adapter_pt,
)
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.errors import AdapterError, FormatError, TensorsError
from mlx_afm.formats.fmadapter import Metadata
from mlx_afm.model import AFMConfig
from tiny import random_adapter, random_tokens, tiny_config, tiny_model, with_adapter

BASE = tiny_config()
# A package says nothing of the vocabulary, a .pt nothing at all.
ORACLE = Path(__file__).parent.parent / "fixtures" / "oracle" / "default"


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    model = with_adapter(tiny_model())
    weights = {name: from_mlx(array) for name, array in adapter_weights(model).items()}
    return Adapter(LoRAConfig(rank=4), BASE, weights)


def values(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.read_values()) for name, tensor in adapter.weights.items()}


def write(form: str, folder: Path, adapter: Adapter) -> Path:
    if form == "folder":
        write_adapter_folder(folder / "adapter", adapter)
        return folder / "adapter"
    if form == "pt":
        write_adapter_pt(folder / "adapter.pt", adapter)
        return folder / "adapter.pt"
    return write_adapter_package(folder / "mine.fmadapter", adapter, Metadata(name="mine", rank=4))


@pytest.mark.parametrize("form", ["folder", "pt", "fmadapter"])
def test_every_form_brings_the_values_back(form, adapter, tmp_path):
    read = read_adapter(write(form, tmp_path, adapter), BASE)
    assert read.config == adapter.config
    wanted, found = values(adapter), values(read)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        rounded = array.astype(np.float16) if form == "fmadapter" else array
        assert np.array_equal(found[name], rounded), name


@pytest.mark.parametrize("form", ["folder", "pt"])
def test_loaded_back_it_gives_the_same_logits(form, adapter, tmp_path):
    """mlx-lm's own afm7 cannot load the adapters it trains."""
    tokens = random_tokens((1, 8))
    wanted = with_adapter(tiny_model())(tokens)
    model = tiny_model()
    attach_adapter(model, read_adapter(write(form, tmp_path, adapter), BASE), where="x")
    assert mx.array_equal(model(tokens), wanted)


def test_a_pt_holds_the_toolkit_names_in_its_order(adapter, tmp_path):
    from mlx_afm.formats.torch_file import read_torch

    names = list(read_torch(write("pt", tmp_path, adapter)))
    assert names[:3] == [
        "layers.segment_0.layer_0.attention.qkv_transform.adapters.base_adapter.lora_0.a_transpose",
        "layers.segment_0.layer_0.attention.qkv_transform.adapters.base_adapter.lora_0.b_transpose",
        "layers.segment_0.layer_0.attention.qkv_transform.adapters.base_adapter.lora_1.a_transpose",
    ]
    assert names[-1] == "layers.segment_1.layer_1.feed_forward.output_transform.adapters.base_adapter.b_transpose"
    assert len(names) == 62


def test_a_toolkit_adapter_by_another_name_keeps_it(tmp_path):
    adapter = read_adapter(ORACLE / "adapter-final.pt", _oracle_base(), 0.5)
    renamed = Adapter(adapter.config, adapter.base, adapter.weights, "other_name")
    write_adapter_folder(tmp_path / "a", renamed)
    write_adapter_pt(tmp_path / "b.pt", read_adapter(tmp_path / "a"))
    assert read_adapter(tmp_path / "b.pt", _oracle_base()).name == "other_name"


def _oracle_base():
    from mlx_afm.checkpoints.toolkit import find_toolkit_files, read_toolkit_checkpoint

    return read_toolkit_checkpoint(find_toolkit_files(ORACLE)).config.model


def test_pt_round_trip_is_bit_identical_to_the_oracles_file(tmp_path):
    from mlx_afm.formats.torch_file import read_torch

    adapter = read_adapter(ORACLE / "adapter-final.pt", _oracle_base(), 0.5)
    write_adapter_folder(tmp_path / "a", adapter)
    write_adapter_pt(tmp_path / "adapter-final.pt", read_adapter(tmp_path / "a"))
    original, back = read_torch(ORACLE / "adapter-final.pt"), read_torch(tmp_path / "adapter-final.pt")
    assert list(original) == list(back)
    assert all(np.array_equal(original[name].read_values(), back[name].read_values()) for name in original)


def test_a_pt_alone_is_recognised_by_apples_sizes_only(adapter, tmp_path):
    with pytest.raises(AdapterError, match="cannot tell which model"):
        read_adapter(write("pt", tmp_path, adapter))


def test_a_pt_of_apples_sizes_needs_no_base(tmp_path):
    base = AFMConfig(num_layers=3, num_kv_reuse_layers=1)
    made = random_adapter(base, LoRAConfig(rank=1))
    read = read_adapter(write("pt", tmp_path, made))
    assert read.base == base
    assert {name: array.tolist() for name, array in values(read).items()} == {
        name: array.tolist() for name, array in values(made).items()
    }


@pytest.mark.parametrize("prompts", [(), ("Be short.",), ("Be short.", None)])
def test_a_folder_keeps_the_system_prompts(prompts, adapter, tmp_path):
    written = write("folder", tmp_path, replace(adapter, system_prompts=prompts))
    assert read_adapter(written).system_prompts == prompts


def test_an_adapter_for_another_base_is_refused_with_the_sizes(adapter, tmp_path):
    folder = write("folder", tmp_path, adapter)
    with pytest.raises(AdapterError, match="num_layers: the model has 6, the adapter was made for 5"):
        read_adapter(folder, tiny_config(num_layers=6))
    with pytest.raises(TensorsError, match=r"missing: layers.segment_0.layer_3"):
        read_adapter(write("pt", tmp_path, adapter), tiny_config(num_layers=6))


def test_damaged_folders_are_refused(adapter, tmp_path):
    folder = write("folder", tmp_path, adapter)
    config = folder / "adapter_config.json"
    good = json.loads(config.read_text())
    for change, message in [
        ({"fine_tune_type": "prefix"}, "expected fine_tune_type lora, dora, full, qat, found prefix"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters without scale"),
        ({"lora_parameters": {"rank": "4", "scale": 0.5}}, "rank: expected a whole number"),
        ({"base_model": {"model_type": "llama"}}, "not an AFM text v7 model"),
    ]:
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(AdapterError, match=message):
            read_adapter(folder)
    config.write_text("{")
    with pytest.raises(FormatError, match=r"adapter_config.json: not JSON"):
        read_adapter(folder)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter here"):
        read_adapter(folder)


def test_zero_adapters_are_known(adapter):
    assert not is_zero(adapter)
    zero = {n: from_mlx(mx.zeros(t.shape)) if n.endswith("lora_b") else t for n, t in adapter.weights.items()}
    assert is_zero(Adapter(adapter.config, BASE, zero))
