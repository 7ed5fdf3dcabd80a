"""The name table against the published facts and the oracle's own files."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import pytest

from mlx_afm.checkpoints.names import Kind, adapter_ids, count_layers, plan_adapter, plan_names, target_of
from mlx_afm.files import read_json
from mlx_afm.formats.fmadapter import plan_records
from mlx_afm.formats.torch_file import read_torch
from mlx_afm.model import AdapterSpec, AFMConfig, ToolkitConfig, parse_toolkit_config

ADAPTER = AdapterSpec(name="base_adapter", rank=32, alpha=16)
ORACLES = Path(__file__).parent.parent / "fixtures" / "oracle"


def test_the_real_model_has_1326_entries_and_the_published_counts():
    entries = plan_names(ToolkitConfig(model=AFMConfig(), adapter=ADAPTER))
    assert len(entries) == 1326
    sizes = {kind: sum(prod(e.shape) for e in entries if e.kind is kind) for kind in Kind}
    assert sizes[Kind.WEIGHT] == 3_111_368_064
    assert sizes[Kind.ADAPTER] == 66_633_728
    assert sum(e.kind in (Kind.RANGE, Kind.SAMPLES) for e in entries) == 140
    assert len(plan_names(ToolkitConfig(model=AFMConfig(), adapter=None))) == 626


def test_the_700_adapter_names_have_the_published_digest():
    names = [entry.toolkit for entry in plan_adapter(AFMConfig(), ADAPTER)]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert (len(names), digest) == (700, "3ff872aafa733f56e1d82573d11b8fc5a2bd0ec59fb797b237140d3291a0d6e6")


def test_a_package_holds_them_in_the_same_order():
    entries = plan_adapter(AFMConfig(), ADAPTER)
    assert [(entry.toolkit, entry.shape) for entry in entries] == [(r.name, r.shape) for r in plan_records()]


@pytest.mark.parametrize("name", ["default", "default-plain", "heads", "uniform", "uniform-plain"])
def test_names_order_and_shapes_of_the_reference(name):
    config = parse_toolkit_config(read_json(ORACLES / name / "base-model-config.json"), where=name)
    tensors = read_torch(ORACLES / name / "base-model.pt")
    entries = plan_names(config)
    assert [entry.toolkit for entry in entries] == list(tensors)
    assert [entry.shape for entry in entries] == [tensor.shape for tensor in tensors.values()]


def test_our_names_are_unique_but_for_the_head():
    entries = plan_names(ToolkitConfig(model=AFMConfig(), adapter=ADAPTER))
    ours = [entry.ours for entry in entries if entry.kind in (Kind.WEIGHT, Kind.RANGE, Kind.ADAPTER)]
    assert len(ours) == len(set(ours)) == 626 - 1 - 70 + 700


def test_parts_of_names():
    names = [entry.toolkit for entry in plan_adapter(AFMConfig(), ADAPTER)]
    assert adapter_ids(names) == ["base_adapter"]
    assert count_layers(names) == (35, 21)
    assert count_layers([entry.ours for entry in plan_adapter(AFMConfig(), ADAPTER)]) == (35, 21)
    assert target_of("model.layers.0.self_attn.qkv_proj.v.lora_b") == "v"
    assert target_of("model.kv_reuse_layers.0.self_attn.q_proj.lora_b") == "q"
    assert target_of("model.layers.0.self_attn.out_proj.lora_a") == "o"
    assert target_of("model.layers.0.mlp.gate_proj.lora_a") == "gate"
