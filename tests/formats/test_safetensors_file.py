"""Safetensors files: byte for byte, both ways with MLX, and hostile headers."""

from __future__ import annotations

import json
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.safetensors_file import read_safetensors, write_safetensors
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor


def raw(header: object, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def test_a_small_file_byte_for_byte(tmp_path):
    tensors = {"a": LazyTensor.of(np.array([1, 2], np.int16)), "b": LazyTensor.of(np.array(1.5, np.float32))}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    )
    header += b" " * (-len(header) % 8)
    assert (tmp_path / "x.safetensors").read_bytes() == raw(header, b"\1\0\2\0" + struct.pack("<f", 1.5))


@pytest.mark.parametrize("dtype", sorted(STORAGE_DTYPES))
def test_read_is_the_inverse_of_write(dtype, tmp_path):
    storage = STORAGE_DTYPES[dtype]
    for shape in ((), (3,), (2, 0, 4), (5, 7)):
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(storage)
        write_safetensors(tmp_path / "x.safetensors", {"t": LazyTensor(dtype, shape, lambda a=array: a)})
        found = read_safetensors(tmp_path / "x.safetensors")["t"]
        assert (found.dtype, found.shape) == (dtype, shape)
        assert np.array_equal(found.read_stored(), array)


def test_mlx_reads_ours_and_we_read_mlxs(tmp_path):
    arrays = {"w": mx.random.normal((4, 3)), "h": mx.random.normal((5,)).astype(mx.bfloat16), "i": mx.arange(3)}
    mx.save_safetensors(str(tmp_path / "theirs.safetensors"), arrays)
    write_safetensors(tmp_path / "ours.safetensors", read_safetensors(tmp_path / "theirs.safetensors"))
    back = mx.load(str(tmp_path / "ours.safetensors"))
    assert back.keys() == arrays.keys()
    assert all(back[name].dtype == array.dtype and mx.array_equal(back[name], array) for name, array in arrays.items())


def test_values_that_are_not_contiguous_are_written_in_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_safetensors(tmp_path / "x.safetensors", {"t": LazyTensor.of(array)})
    assert np.array_equal(read_safetensors(tmp_path / "x.safetensors")["t"].read_stored(), array)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise OSError("disk on fire")

    tensors = {"a": LazyTensor.of(np.ones(3, np.float32)), "b": LazyTensor("float32", (3,), fail)}
    with pytest.raises(OSError, match="fire"):
        write_safetensors(tmp_path / "x.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\1\0\0", "not a safetensors file"),
        (struct.pack("<Q", 1 << 62), "not a safetensors file"),
        (raw(b"{}")[:-1], "not a safetensors file"),
        (raw(b"\xff\xfe"), "the header is not JSON"),
        (raw(b"[" * 5000 + b"]" * 5000), "the header is not"),
        (raw(b"9" * 5000), "the header is not"),
        (raw([1]), "not a JSON object"),
        (raw({"t": 1}), "tensor t: damaged header entry"),
        (raw({"t": {**GOOD, "dtype": "X9"}}, b"1234"), "damaged header entry"),
        (raw({"t": {**GOOD, "shape": [-1]}}, b"1234"), "whole numbers"),
        (raw({"t": {**GOOD, "shape": [1.0]}}, b"1234"), "whole numbers"),
        (raw({"t": {**GOOD, "shape": [True]}}, b"1234"), "whole numbers"),
        (raw({"t": {**GOOD, "shape": [1 << 62, 4]}}, b"1234"), "the values do not fit"),
        (raw({"t": {**GOOD, "data_offsets": [0, 8]}}, b"12345678"), "the values do not fit"),
        (raw({"t": {**GOOD, "data_offsets": [4, 8]}}, b"1234"), "the values do not fit"),
        (raw({"t": {**GOOD, "data_offsets": [4, 0]}}, b"1234"), "the values do not fit"),
        (raw({"t": {**GOOD, "data_offsets": [0]}}, b"1234"), "damaged header entry"),
        (raw({"t": GOOD, "u": {**GOOD, "data_offsets": [2, 6]}}, b"123456"), "tensors overlap"),
    ],
)
def test_hostile_headers_end_in_one_error(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        read_safetensors(path)
    assert "x.safetensors" in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        read_safetensors(tmp_path / "x.safetensors")
