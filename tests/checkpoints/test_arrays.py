"""Casting tensors of files: rounding, blocks, and what is left alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.checkpoints.arrays import cast, from_mlx, to_bfloat16, to_mlx
from mlx_afm.errors import TensorsError
from mlx_afm.formats import tensors as tensors_module
from mlx_afm.formats.safetensors_file import write_safetensors
from mlx_afm.formats.tensors import LazyTensor


def test_bfloat16_rounds_to_nearest_even_like_mlx():
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 1 << 32, 200_000, dtype=np.uint32), np.arange(1 << 17, dtype=np.uint32) << 15]
    )
    values = bits.view(np.float32)
    known = ~np.isnan(values)
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    assert np.array_equal(to_bfloat16(values)[known], expected[known])
    wide = to_bfloat16(values)[~known].astype(np.uint32) << 16
    assert np.isnan(wide.view(np.float32)).all()
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000], np.uint32).view(np.float32)
    assert to_bfloat16(ties).tolist() == [0x3F80, 0x3F82, 0x7F80, 0xFF80]


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_blocks_are_the_whole(source, target, monkeypatch):
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 64)
    values = np.random.default_rng(1).standard_normal((7, 11))
    if source == "bfloat16":
        tensor = from_mlx(mx.array(values.astype(np.float32)).astype(mx.bfloat16))
    else:
        tensor = LazyTensor.of(values.astype(source))
    done = cast(tensor, target)
    assert (done.dtype, done.shape) == (target, (7, 11))
    blocks = list(done.iter_stored())
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks), done.read_stored().reshape(-1))
    assert b"".join(done.iter_bytes("x")) == done.read_stored().tobytes()
    assert mx.array_equal(to_mlx(done), to_mlx(tensor).astype(getattr(mx, target)))


def test_integers_and_equal_dtypes_are_left_alone():
    counter = LazyTensor.of(np.array(3, np.int64))
    assert cast(counter, "bfloat16") is counter
    tensor = LazyTensor.of(np.ones(3, np.float32))
    assert cast(tensor, "float32") is cast(tensor, None) is tensor


def test_a_tensor_that_is_not_what_it_promised_is_refused():
    short = LazyTensor("float32", (4,), lambda: np.ones(3, np.float32))
    with pytest.raises(TensorsError, match=r"here: not the promised tensor \(expected 16 bytes, found 12 bytes"):
        list(short.iter_bytes("here"))
    other = LazyTensor("float32", (3,), lambda: np.ones(3, np.float64))
    with pytest.raises(TensorsError, match="expected float32, found float64"):
        list(other.iter_bytes("here"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int32], ids=str)
def test_arrays_not_yet_evaluated_are_written(dtype, tmp_path):
    """Files are written with a thread that reads ahead, and MLX's streams belong to the thread that made them."""
    for turn in range(5):
        arrays = {f"t{index}": (mx.random.normal((64, 64)) * (turn + 1)).astype(dtype) for index in range(5)}
        write_safetensors(tmp_path / "x.safetensors", {name: from_mlx(array) for name, array in arrays.items()})
        back = mx.load(str(tmp_path / "x.safetensors"))
        assert all(mx.array_equal(back[name], array) for name, array in arrays.items())
