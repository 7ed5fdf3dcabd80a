"""State dicts as pickles. The bytes of a small one stand here as CPython's pickler writes them for torch."""

import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.tensors import STORAGE_DTYPES
from mlx_afm.formats.torch_names import RawStorage, RawTensor
from mlx_afm.formats.torch_opcodes import parse_pickle
from mlx_afm.formats.torch_pickle import (
    MAX_ELEMENTS,
    MAX_TENSORS,
    TensorSpec,
    contiguous_strides,
    pickle_state_dict,
    specs_of,
)


def parse_state_dict(data, where):
    value, end = parse_pickle(data, where)
    assert end == len(data)
    return specs_of(value, where)


SMALL = {
    "w": TensorSpec("float32", (2, 300), (300, 1), 0, "0", 600),
    "tied": TensorSpec("float32", (300,), (1,), 300, "0", 600),
    "n": TensorSpec("uint16", (), (), 0, "1", 1),
}
# torch.save(OrderedDict(w=..., tied=w[1], n=torch.tensor(1, dtype=torch.uint16)), ...), torch 2.15.
SMALL_BYTES = (
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00wq\x02ctorch._utils\n_rebuild_tensor_v2\nq\x03"
    b"((X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07MX\x02"
    b"tq\x08QK\x00K\x02M,\x01\x86q\tM,\x01K\x01\x86q\n\x89h\x00)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00tiedq\x0eh\x03"
    b"((h\x04h\x05h\x06h\x07MX\x02tq\x0fQM,\x01M,\x01\x85q\x10K\x01\x85q\x11\x89h\x00)Rq\x12tq\x13Rq\x14"
    b"X\x01\x00\x00\x00nq\x15ctorch._utils\n_rebuild_tensor_v3\nq\x16((h\x04ctorch.storage\nUntypedStorage\nq\x17"
    b"X\x01\x00\x00\x001q\x18h\x07K\x02tq\x19QK\x00))\x89h\x00)Rq\x1actorch\nuint16\nq\x1btq\x1cRq\x1du."
)


def tensor(dtype="float32", numel=6, offset=0, shape=(2, 3), strides=(3, 1), typed=True):
    return RawTensor(dtype, RawStorage(dtype if typed else None, "0", numel), offset, shape, strides)


def test_bytes_are_those_of_torch():
    assert pickle_state_dict(SMALL) == SMALL_BYTES


def test_parsing_inverts_pickling():
    assert parse_state_dict(SMALL_BYTES, "x") == SMALL
    assert list(parse_state_dict(SMALL_BYTES, "x")) == list(SMALL)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2000, 2001])
def test_any_number_of_tensors_of_any_dtype_and_size(count):
    dtypes = list(STORAGE_DTYPES)
    shapes = [(), (0,), (255,), (256, 2), (65536,), (1 << 31,), (1 << 40, 1), (2, 3, 4), (1, 2, 3, 4, 5)]
    specs = {}
    for number in range(count):
        shape = shapes[number % len(shapes)]
        size = TensorSpec("bool", shape, (), 0, "", 0).size
        strides = contiguous_strides(shape)
        specs[f"é{number}"] = TensorSpec(dtypes[number % 13], shape, strides, number, str(number), size + number)
    read = parse_state_dict(pickle_state_dict(specs), "x")
    assert read == specs
    assert list(read) == list(specs)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((), ()), ((5,), (1,)), ((2, 3, 4), (12, 4, 1)), ((2, 0, 3), (3, 3, 1)), ((1, 1), (1, 1))],
)
def test_contiguous_strides_are_torch_s(shape, strides):
    assert contiguous_strides(shape) == strides


def test_a_view_may_end_at_the_last_element_and_an_empty_one_anywhere():
    specs = specs_of(
        {
            "last": tensor(numel=10, offset=4),
            "spread": tensor(shape=(2, 2), strides=(3, 2)),
            "expanded": tensor(shape=(1000, 6), strides=(0, 1)),
            "empty": tensor(offset=30, shape=(0, 5)),
            "huge step never taken": tensor(shape=(1, 6), strides=(1 << 62, 1)),
        },
        "x",
    )
    assert [spec.offset for spec in specs.values()] == [4, 0, 0, 30, 0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (tensor(offset=1), "reaches element 6 of a storage of 6"),
        (tensor(strides=(4, 1)), "reaches element 6"),
        (tensor(numel=0), "reaches element 5 of a storage of 0"),
        (tensor(shape=(), strides=(), offset=6), "reaches element 6"),
        (tensor(strides=(1 << 120, 1)), "reaches element"),
        (tensor(offset=-1), "negative"),
        (tensor(shape=(-2, -3)), "negative"),
        (tensor(strides=(-3, 1)), "negative"),
        (tensor(numel=-6), "negative"),
        (tensor(strides=(1,)), "2 sizes but 1 strides"),
        (tensor(shape=(MAX_ELEMENTS, 2), strides=(0, 0)), "more than"),
        (tensor(shape=(0, 1 << 60)), "more than"),
        (tensor("uint16", numel=13, typed=False), "13 bytes is no whole number of uint16"),
        (tensor("complex64"), "dtype complex64 is not supported"),
        (tensor("qint8"), "dtype qint8 is not supported"),
        (tensor("float8_e5m2", typed=False), "dtype float8_e5m2 is not supported"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_name(raw, message):
    with pytest.raises(FormatError, match=f"'layers.0': .*{message}"):
        specs_of({"fine": tensor(), "layers.0": raw}, "x")


def test_all_faults_come_in_one_error():
    with pytest.raises(FormatError) as caught:
        specs_of({f"t{number}": tensor(offset=number) for number in range(30)}, "some.pt")
    assert len(caught.value.details) == 21
    assert caught.value.details[-1] == "and 9 more"


@pytest.mark.parametrize("value", [None, [], (), 3, tensor()])
def test_what_is_no_dictionary_is_refused(value):
    with pytest.raises(FormatError, match="not a state dict"):
        specs_of(value, "x")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_wrapped_state_dict_is_refused_with_the_keys_found(key):
    with pytest.raises(FormatError, match=rf"found keys '{key}', 'epoch'.*\n  '{key}': dict\n  'epoch': int"):
        specs_of({key: {"w": tensor()}, "epoch": 3}, "x")


def test_numbered_tensors_are_refused():
    with pytest.raises(FormatError, match="'0': tensor"):
        specs_of({0: tensor()}, "x")


def test_too_many_tensors_are_refused():
    with pytest.raises(FormatError, match="too many tensors"):
        specs_of({str(number): tensor() for number in range(MAX_TENSORS + 1)}, "x")


def test_as_many_tensors_as_may_be_written_can_be_read():
    specs = {
        f"t{number}": TensorSpec("float32", (1,) * 4, (1,) * 4, 0, str(number), 1) for number in range(MAX_TENSORS)
    }
    assert len(parse_state_dict(pickle_state_dict(specs), "x")) == MAX_TENSORS


@pytest.mark.parity
@pytest.mark.parametrize("count", [1, 2, 1000, 1001, 2001])
def test_torch_pickles_the_same_bytes(tmp_path, count):
    torch = pytest.importorskip("torch")
    import zipfile
    from collections import OrderedDict

    shapes = [(), (0, 2), (3,), (300, 2), (1, 2, 3, 4)]
    entries = [(f"name.{number}", torch.zeros(shapes[number % 5])) for number in range(count)]
    torch.save(OrderedDict(entries), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        theirs = archive.read("x/data.pkl")
    specs = {
        name: TensorSpec("float32", tuple(value.shape), value.stride(), 0, str(key), value.numel())
        for key, (name, value) in enumerate(entries)
    }
    assert pickle_state_dict(specs) == theirs
    assert parse_state_dict(theirs, "x") == specs
