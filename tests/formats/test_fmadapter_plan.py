"""The plan of a package against the published facts and tamm, and the stored form of values against loops."""

import hashlib
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_afm.errors import AdapterError, ConfigError
from mlx_afm.formats.blob import blob_file_bytes
from mlx_afm.formats.fmadapter_plan import APPLE_GEOMETRY, Geometry, Record, loaded_values, plan_records, stored_values
from mlx_afm.formats.tensors import LazyTensor

TINY = Geometry(ordinary_layers=2, reuse_layers=1, hidden=16, heads=2, kv_heads=1, feed_forward=24, rank=2)


def test_apple_plan_has_the_published_names_and_size():
    records = plan_records()
    digest = hashlib.sha256("\n".join(record.name for record in records).encode()).hexdigest()
    assert digest == "3ff872aafa733f56e1d82573d11b8fc5a2bd0ec59fb797b237140d3291a0d6e6"
    assert sum(record.nbytes for record in records) == 2 * 66_633_728
    assert blob_file_bytes(record.nbytes for record in records) == 133_312_320
    assert records[490].name == "layers.segment_1.layer_0.attention.q_transform.adapters.base_adapter.a_transpose"


def test_first_apple_layer_has_the_published_sizes_and_heads():
    layer = plan_records()[:14]
    qkv = [131072, 131072, 131072, 16384, 131072, 16384]
    rest = [131072, 131072, 131072, 425984, 131072, 425984, 425984, 131072]
    assert [record.nbytes for record in layer] == qkv + rest
    assert [record.heads for record in layer] == [0, 16, 0, 2] + 10 * [0]
    assert [record.heads for record in plan_records()[490:500]] == [0, 16] + 8 * [0]
    assert layer[3].shape == (32, 256)
    assert layer[3].stored_shape == (256, 32)


def test_layers_count_as_numbers():
    names = [record.name for record in plan_records(Geometry(ordinary_layers=11, reuse_layers=0))]
    layers = list(dict.fromkeys(name.split(".")[1] for name in names))
    assert layers == [f"layer_{index}" for index in range(11)]


def test_without_reusing_layers_names_have_no_segment():
    with_reuse = plan_records(TINY)[:28]
    without = plan_records(Geometry(**{**asdict(TINY), "reuse_layers": 0}))
    assert [record.name for record in without] == [record.name.replace(".segment_0", "") for record in with_reuse]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden": 0}, "hidden must be a whole number from 1"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"ordinary_layers": 10**9}, "ordinary_layers must be a whole number from 1 to 1024"),
        ({"hidden": 2040}, "rotary pairs need even widths"),
        ({"kv_heads": 3}, "heads 16 is no multiple of kv_heads 3"),
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        Geometry(**sizes)


def test_geometry_survives_json_form():
    assert Geometry.from_dict(asdict(TINY)) == TINY
    assert TINY.head_width == 8
    for sizes in ([], {}, {**asdict(TINY), "extra": 1}, None):
        with pytest.raises(ConfigError, match="not a geometry"):
            Geometry.from_dict(sizes)


def test_stored_values_follow_the_published_formula():
    record = plan_records(TINY)[1]  # B of Q: two heads, eight wide
    values = np.random.default_rng(0).standard_normal(record.shape).astype(np.float32)
    stored, d = stored_values(values, record), 8
    for h in range(2):
        for p in range(2):
            for i in range(d // 2):
                new, old = h * d + p * d // 2 + i, h * d + 2 * i + p
                np.testing.assert_array_equal(stored[new], values[:, old].astype(np.float16))


def test_documented_example_of_one_head():
    record = Record("b", (1, 6), 1)
    stored = stored_values(np.arange(6, dtype=np.float32)[None], record)
    np.testing.assert_array_equal(stored[:, 0], [0, 2, 4, 1, 3, 5])


def test_matrices_without_rotary_rows_are_only_transposed():
    record = plan_records(TINY)[0]
    values = np.random.default_rng(0).standard_normal(record.shape).astype(np.float16)
    np.testing.assert_array_equal(stored_values(values, record), values.T)
    assert stored_values(values, record).flags.c_contiguous


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(0, 5), half=st.integers(1, 5), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_loading_is_the_inverse_of_storing(heads, half, rank, seed):
    record = Record("b", (rank, max(heads, 1) * half * 2), heads)
    values = np.random.default_rng(seed).standard_normal(record.shape).astype(np.float16)
    stored = stored_values(values, record)
    assert stored.shape == record.stored_shape
    np.testing.assert_array_equal(loaded_values(stored.reshape(-1), record), values)
    np.testing.assert_array_equal(stored_values(loaded_values(stored, record), record), stored)


def test_rounding_is_to_nearest_even():
    record = Record("a", (4, 1), 0)
    values = np.array([[1 + 2**-11], [1 + 3 * 2**-11], [65519.99], [1e-9]], np.float32)
    np.testing.assert_array_equal(stored_values(values, record)[0], np.array([1, 1 + 2**-9, 65504, 0], np.float16))


@pytest.mark.parametrize(
    ("value", "words"),
    [(65520.0, "1 values are too large for fp16"), (-1e30, "found 1e.30"), (np.inf, "infinite"), (np.nan, "infinite")],
)
def test_values_that_fp16_cannot_hold_are_refused_by_name(value, words):
    values = np.array([[1.0, value]], np.float32)
    with pytest.raises(AdapterError, match=f"layers.x.b_transpose: .*{words}"):
        stored_values(values, Record("layers.x.b_transpose", (1, 2), 0))


def test_wrong_shape_and_dtype_are_refused_by_name():
    record = Record("layers.x", (1, 2), 0)
    with pytest.raises(AdapterError, match=r"layers.x: expected shape \(1, 2\), found \(2, 1\)"):
        stored_values(np.zeros((2, 1), np.float32), record)
    with pytest.raises(AdapterError, match=r"layers.x: expected float32, found bfloat16"):
        stored_values(LazyTensor("bfloat16", (1, 2), lambda: np.zeros((1, 2), np.uint16)), record)


def test_apple_defaults():
    assert asdict(APPLE_GEOMETRY) == {
        "ordinary_layers": 35,
        "reuse_layers": 21,
        "hidden": 2048,
        "heads": 16,
        "kv_heads": 2,
        "feed_forward": 6656,
        "rank": 32,
    }


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("reuse_layers", [0, 2])
def test_names_shapes_and_order_are_those_of_tamm(reuse_layers):
    pytest.importorskip("tamm", reason="needs tamm (extra `parity`)")
    from tamm import adapters
    from tamm.models.afm_text import AFMTextV7

    config = AFMTextV7.Config(
        vocab_size=32,
        hidden_dim=64,
        num_layers=3 + reuse_layers,
        num_kv_reuse_layers=reuse_layers,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim_scale_factor=3.25,
    )
    config.adapters = {"base_adapter": adapters.LoRAModelAdapter(rank=4, alpha=2)}
    state = config.create_model().state_dict()
    theirs = [(name, tuple(tensor.shape)) for name, tensor in state.items() if "adapter" in name]
    sizes = Geometry(
        ordinary_layers=3, reuse_layers=reuse_layers, hidden=64, heads=4, kv_heads=2, feed_forward=208, rank=4
    )
    assert [(record.name, record.shape) for record in plan_records(sizes)] == theirs
