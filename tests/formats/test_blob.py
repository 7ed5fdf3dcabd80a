"""Blob storage v2: bytes from the format description, hostile files, and coremltools' writer and reader."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_afm.errors import FormatError
from mlx_afm.formats.blob import MAX_RECORDS, TYPES, blob_file_bytes, read_blobs, walk_blobs, write_blobs

ONE_RECORD = bytes.fromhex(
    "01000000 02000000" + 56 * "00"  # one record, version 2
    + "efbeadde 01000000 0a00000000000000 8000000000000000 0000000000000000" + 32 * "00"
    + "003c 0040 0042 0044 0045"
)  # fmt: skip
# Type code, unused bits, payload: values 1, -2, 3 and so on as measured with coremltools.
PACKED = {
    "int4": (8, 4, "e103"),
    "uint4": (11, 4, "210f"),
    "uint3": (12, 7, "d101"),
    "uint6": (13, 6, "81f003"),
    "uint1": (9, 5, "05"),
}


def record(code, payload, offset, padding=0, sentinel=0xDEADBEEF):
    return struct.pack("<IIQQQ32x", sentinel, code, len(payload), offset, padding) + payload


def findings(data):
    found = []
    walk_blobs(np.frombuffer(data, np.uint8), lambda rule, message: found.append((rule, message)))
    return found


def test_one_record_is_written_byte_for_byte(tmp_path):
    write_blobs(tmp_path / "w.bin", [np.array([1, 2, 3, 4, 5], np.float16)])
    assert (tmp_path / "w.bin").read_bytes() == ONE_RECORD


def test_zeros_separate_records_and_nothing_follows_the_last(tmp_path):
    write_blobs(tmp_path / "w.bin", (np.full(n, 1, np.float16) for n in (5, 0, 32, 3)))
    data = (tmp_path / "w.bin").read_bytes()
    assert data[:8] == struct.pack("<II", 4, 2)
    assert data[128:138] == 5 * b"\x00\x3c"
    assert data[138:192] == bytes(54)
    assert [blob.metadata_offset for blob in read_blobs(tmp_path / "w.bin")] == [64, 192, 256, 384]
    assert len(data) == 384 + 64 + 6 == blob_file_bytes([10, 0, 64, 6])


def test_a_file_without_records_is_one_header(tmp_path):
    write_blobs(tmp_path / "w.bin", [])
    assert (tmp_path / "w.bin").read_bytes() == struct.pack("<II56x", 0, 2)
    assert read_blobs(tmp_path / "w.bin") == []


def test_arrays_in_any_memory_order_are_written_row_by_row(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_blobs(tmp_path / "a.bin", [array])
    write_blobs(tmp_path / "b.bin", [np.asfortranarray(array)])
    write_blobs(tmp_path / "c.bin", [array.astype(">f2")])
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == (tmp_path / "c.bin").read_bytes()


def test_what_was_written_is_read(tmp_path):
    arrays = [np.random.default_rng(n).standard_normal(n).astype(np.float16) for n in (1, 31, 32, 33, 500)]
    write_blobs(tmp_path / "w.bin", arrays)
    blobs = read_blobs(tmp_path / "w.bin")
    assert [blob.dtype for blob in blobs] == 5 * ["fp16"]
    for array, blob in zip(arrays, blobs, strict=True):
        assert (blob.type_code, blob.nbytes, blob.padding_bits) == (1, array.nbytes, 0)
        assert not blob.read().flags.owndata
        np.testing.assert_array_equal(blob.read(), array)


def test_other_dtypes_are_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"old")
    with pytest.raises(FormatError, match=r"record 1: not a float16 array \(found float32\)"):
        write_blobs(path, iter([np.zeros(2, np.float16), np.zeros(2, np.float32)]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.bin"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", PACKED)
def test_sub_byte_records_are_read_as_packed_bytes(tmp_path, name):
    code, padding, payload = PACKED[name]
    (tmp_path / "w.bin").write_bytes(struct.pack("<II56x", 1, 2) + record(code, bytes.fromhex(payload), 128, padding))
    (blob,) = read_blobs(tmp_path / "w.bin")
    assert (blob.dtype, blob.padding_bits, blob.read().tobytes().hex()) == (name, padding, payload)


@pytest.mark.parametrize("code", TYPES)
def test_every_type_is_read_with_its_width(tmp_path, code):
    (tmp_path / "w.bin").write_bytes(struct.pack("<II56x", 1, 2) + record(code, bytes(range(12)), 128))
    (blob,) = read_blobs(tmp_path / "w.bin")
    assert blob.read().nbytes == 12
    assert blob.read().itemsize * 8 == max(TYPES[code].bits, 8)
    assert blob.read().tobytes() == bytes(range(12))


def patched(offset, content, data=ONE_RECORD):
    return data[:offset] + content + data[offset + len(content) :]


TWO = struct.pack("<II56x", 2, 2) + ONE_RECORD[64:] + bytes(54) + record(1, b"\x00\x3c", 256)
DAMAGED = {
    "C1": ONE_RECORD[:63],
    "C2": patched(4, b"\x01"),
    "C3": patched(63, b"\x01"),
    "C4": patched(0, b"\x02"),
    "C5": patched(64, b"\x00"),
    "C6": patched(68, b"\x12"),
    "C7": patched(80, b"\xc0", ONE_RECORD + bytes(64)),
    "C7 C8 C13 C14": patched(80, b"\x82", ONE_RECORD) + bytes(2) + b"x",
    "C7 C9": patched(80, b"\x40"),
    "C9": patched(72, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    "C10 C13 C14": patched(72, b"\x09"),
    "C11": patched(88, b"\x08"),
    "C12": patched(127, b"\x01"),
    "C13": patched(140, b"\x01", TWO),
    "C14": ONE_RECORD + bytes(54),
}


@pytest.mark.parametrize("rules", DAMAGED)
def test_damage_breaks_the_intended_rules(tmp_path, rules):
    assert {rule for rule, _ in findings(DAMAGED[rules])} == set(rules.split())
    (tmp_path / "w.bin").write_bytes(DAMAGED[rules])
    with pytest.raises(FormatError, match=rules.split()[0]):
        read_blobs(tmp_path / "w.bin")


@pytest.mark.parametrize(
    ("code", "size", "padding", "sound"),
    [
        (8, 2, 4, True),
        (8, 2, 3, False),
        (12, 2, 7, True),
        (12, 2, 0, False),
        (13, 3, 6, True),
        (9, 1, 8, False),
        (11, 0, 4, False),
        (1, 2, 1, False),
    ],
)
def test_unused_bits_must_leave_whole_elements(code, size, padding, sound):
    data = struct.pack("<II56x", 1, 2) + record(code, bytes(size), 128, padding)
    assert [rule for rule, _ in findings(data)] == ([] if sound else ["C11"])


def test_a_huge_count_is_no_huge_walk():
    assert findings(struct.pack("<II56x", 2**32 - 1, 2) + ONE_RECORD[64:] + bytes(54))[0][0] == "C4"
    empty = b"".join(record(1, b"", 128 + 64 * index) for index in range(MAX_RECORDS + 5))
    assert [rule for rule, _ in findings(struct.pack("<II56x", MAX_RECORDS + 5, 2) + empty)] == ["C4"]


def test_what_is_no_file_is_refused(tmp_path):
    for path, words in ((tmp_path, "not a regular file"), (tmp_path / "none", "no such file")):
        with pytest.raises(FormatError, match=words):
            read_blobs(path)
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="C1: 0 bytes"):
        read_blobs(tmp_path / "empty")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TWO) - 1), st.binary(min_size=1, max_size=8)), max_size=4), st.data())
def test_no_bytes_make_the_walk_raise(patches, data):
    content = TWO
    for offset, piece in patches:
        content = patched(offset, piece, content)
    content = content[: data.draw(st.integers(0, len(content)))]
    blobs = walk_blobs(np.frombuffer(content, np.uint8), lambda rule, message: None)
    assert all(blob.offset + blob.nbytes <= len(content) for blob in blobs)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_files_are_at_fault_and_nothing_is_raised(content):
    rules = []
    blobs = walk_blobs(np.frombuffer(content, np.uint8), lambda rule, message: rules.append(rule))
    assert rules or not blobs  # a header that announces nothing is sound
    assert all(blob.offset + blob.nbytes <= len(content) for blob in blobs)


@pytest.fixture
def storage():
    reason = "needs coremltools (extra `parity`)"
    return pytest.importorskip("coremltools.libmilstoragepython", reason=reason, exc_type=ImportError)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_coremltools_writes_the_same_bytes(tmp_path, storage):
    arrays = [np.random.default_rng(n).standard_normal(n).astype(np.float16) for n in (5, 0, 1, 32, 33, 4096, 7, 0)]
    writer = storage._BlobStorageWriter(str(tmp_path / "theirs.bin"))
    offsets = [writer.write_fp16_data(array.view(np.uint16)) for array in arrays]
    del writer  # closes the file
    write_blobs(tmp_path / "ours.bin", arrays)
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert [blob.metadata_offset for blob in read_blobs(tmp_path / "ours.bin")] == offsets


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_every_type_that_coremltools_writes_is_read(tmp_path, storage):
    values = {
        "write_float_data": ("fp32", np.array([1.5, -2], np.float32)),
        "write_fp16_data": ("fp16", np.array([1.5, -2], np.float16).view(np.uint16)),
        "write_uint8_data": ("uint8", np.array([1, 255], np.uint8)),
        "write_int8_data": ("int8", np.array([1, -2], np.int8)),
        "write_int16_data": ("int16", np.array([1, -2], np.int16)),
        "write_uint16_data": ("uint16", np.array([1, 65535], np.uint16)),
        "write_int32_data": ("int32", np.array([1, -2], np.int32)),
        "write_uint32_data": ("uint32", np.array([1, 2**32 - 1], np.uint32)),
        "write_int4_data": ("int4", np.array([1, -2, 3], np.int8)),
        "write_uint1_data": ("uint1", np.array([1, 0, 1], np.uint8)),
        "write_uint2_data": ("uint2", np.array([1, 2, 3], np.uint8)),
        "write_uint3_data": ("uint3", np.array([1, 2, 7], np.uint8)),
        "write_uint4_data": ("uint4", np.array([1, 2, 15], np.uint8)),
        "write_uint6_data": ("uint6", np.array([1, 2, 63], np.uint8)),
    }
    writer = storage._BlobStorageWriter(str(tmp_path / "w.bin"))
    offsets = [getattr(writer, method)(array) for method, (_, array) in values.items()]
    del writer
    blobs = read_blobs(tmp_path / "w.bin")
    assert [blob.metadata_offset for blob in blobs] == offsets
    for blob, (name, array) in zip(blobs, values.values(), strict=True):
        assert blob.dtype == name
        if name in PACKED:
            assert (blob.type_code, blob.padding_bits, blob.read().tobytes().hex()) == PACKED[name]
        elif name != "uint2":
            assert blob.read().tobytes() == array.tobytes()
