"""Shards and their index."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.mlx_folder import plan_shards, read_shards, shard_files, write_shards
from mlx_afm.formats.tensors import LazyTensor

TENSORS = {name: LazyTensor.of(np.full(size, size, np.float32)) for name, size in (("a", 10), ("b", 20), ("c", 5))}


def test_shards_are_cut_where_they_are_full_and_a_large_tensor_has_its_own():
    assert plan_shards({"a": 3, "b": 3, "c": 3}, 6) == [["a", "b"], ["c"]]
    assert plan_shards({"a": 1, "b": 9, "c": 1}, 6) == [["a"], ["b"], ["c"]]
    assert plan_shards({}, 6) == [[]]


def test_one_shard_and_its_index(tmp_path):
    write_shards(tmp_path, TENSORS)
    assert [path.name for path in shard_files(tmp_path)] == ["model.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 140},
        "weight_map": dict.fromkeys("abc", "model.safetensors"),
    }


def test_several_shards_read_back_as_one(tmp_path):
    write_shards(tmp_path, TENSORS, max_shard_bytes=80)
    names = [path.name for path in shard_files(tmp_path)]
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    found = read_shards(tmp_path)
    assert all(np.array_equal(found[name].read_stored(), tensor.read_stored()) for name, tensor in TENSORS.items())


def test_faulty_folders(tmp_path):
    with pytest.raises(FormatError, match="no weights"):
        read_shards(tmp_path)
    write_shards(tmp_path, TENSORS)
    (tmp_path / "model-copy.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(FormatError, match="tensor a occurs in two files"):
        read_shards(tmp_path)
