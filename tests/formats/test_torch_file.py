"""Checkpoints: those of torch (`make_torch_fixtures.py`) are read right, ours equal them, hostile ones are refused."""

import gc
import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_afm.errors import FormatError, TensorsError
from mlx_afm.formats import torch_file
from mlx_afm.formats.tensors import STORAGE_DTYPES, LazyTensor
from mlx_afm.formats.torch_file import MAX_EXPANDED_BYTES, read_torch, write_torch
from mlx_afm.formats.torch_pickle import TensorSpec, pickle_state_dict
from torch_builders import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
GRID = np.arange(24, dtype=np.float32).reshape(4, 6)


def fixture(name):
    return read_torch(FIXTURES / f"{name}.pt")


def values(tensors):
    return {name: (tensor.dtype, tensor.read_stored().tolist()) for name, tensor in tensors.items()}


def some_tensors(seed=0):
    random = np.random.default_rng(seed)
    tensors = {}
    for dtype, storage in STORAGE_DTYPES.items():
        for shape in [(), (0,), (3, 4), (2, 0, 5), (1, 2, 3, 2)]:
            raw = random.integers(0, 2, (*shape, storage.itemsize), dtype=np.uint8)
            array = raw.view(storage).reshape(shape)
            tensors[f"{dtype}.{shape}"] = LazyTensor(dtype, shape, lambda array=array: array)
    return tensors


# Files by torch.


def test_tied_weights_of_a_module():
    tensors = fixture("tied")
    assert list(tensors) == ["embedding.weight", "head.weight"]
    arrays = [tensor.read_stored() for tensor in tensors.values()]
    assert all(array.tolist() == np.arange(12.0).reshape(4, 3).tolist() for array in arrays)
    assert np.shares_memory(*arrays)


def test_every_dtype_scalars_and_empty_tensors():
    tensors = fixture("contiguous")
    for dtype, storage in STORAGE_DTYPES.items():
        array = tensors[f"{dtype}.weight"].read_stored()
        assert (tensors[f"{dtype}.weight"].dtype, array.dtype) == (dtype, storage)
        bits = {"bfloat16": [0, 0x3F80, 0x4000], "bool": [False, True, True]}
        assert array.tolist() == bits.get(dtype, [0, 1, 2])
    assert list(tensors)[13:] == ["scalar", "empty", "grid", "alias"]
    assert tensors["scalar"].read_stored().tolist() == 2.5
    assert tensors["empty"].read_stored().shape == tensors["empty"].shape == (2, 0, 3)
    np.testing.assert_array_equal(tensors["grid"].read_stored(), np.arange(600, dtype=np.float32).reshape(300, 2))


def test_views_of_every_kind_share_the_file_s_bytes():
    arrays = {name: tensor.read_stored() for name, tensor in fixture("views").items()}
    expected = {
        "base": GRID,
        "same": GRID,
        "transposed": GRID.T,
        "middle": GRID[1:3, 2:5],
        "every_other": GRID[:, ::2],
        "none_left": GRID[4:, 6:],
        "repeated": np.ones((3, 2)),
        "permuted": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        "parameter": np.arange(4).reshape(2, 2),
    }
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    for name in ("same", "transposed", "middle", "every_other", "repeated"):
        assert np.shares_memory(arrays["base"], arrays[name])
    assert not arrays["transposed"].flags.c_contiguous


def test_unsupported_dtypes_are_named_with_their_tensors():
    with pytest.raises(FormatError) as caught:
        fixture("unsupported")
    assert caught.value.details == (
        "'wave': dtype complex64 is not supported",
        "'tiny.weight': dtype float8_e4m3fn is not supported",
    )


def test_we_write_what_torch_writes(tmp_path, monkeypatch):
    theirs = (FIXTURES / "contiguous.pt").read_bytes()
    with zipfile.ZipFile(FIXTURES / "contiguous.pt") as archive:
        identity = archive.read("contiguous/.data/serialization_id")
    tensors = fixture("contiguous")
    del tensors["alias"]
    path = tmp_path / "contiguous.pt"

    write_torch(path, tensors, aliases={"alias": "float64.weight"})
    with zipfile.ZipFile(path) as archive:
        ours = archive.read("contiguous/.data/serialization_id")
    assert re.fullmatch(rb"[0-9]{40}", ours)
    assert len(path.read_bytes()) == len(theirs)

    monkeypatch.setattr(torch_file, "_serialization_id", lambda archive: identity)
    write_torch(path, tensors, aliases={"alias": "float64.weight"})
    assert path.read_bytes() == theirs


# Writing.


def test_reading_inverts_writing(tmp_path):
    tensors = some_tensors()
    write_torch(tmp_path / "a.pt", tensors)
    read = read_torch(tmp_path / "a.pt")
    assert list(read) == list(tensors)
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert tensor.read_stored().tobytes() == tensors[name].read_stored().tobytes()


def test_views_are_written_as_tensors_of_their_own(tmp_path):
    write_torch(tmp_path / "a.pt", fixture("views"))
    assert values(read_torch(tmp_path / "a.pt")) == values(fixture("views"))
    assert all(tensor.read_stored().flags.c_contiguous for tensor in read_torch(tmp_path / "a.pt").values())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    files = []
    for folder in ("one", "two"):
        write_torch(tmp_path / folder / "a.pt", some_tensors(), aliases={"twin": "float32.(3, 4)"})
        files.append((tmp_path / folder / "a.pt").read_bytes())
    assert files[0] == files[1]
    write_torch(tmp_path / "a.pt", some_tensors(seed=1), aliases={"twin": "float32.(3, 4)"})
    assert (tmp_path / "a.pt").read_bytes()[-2000:] != files[0][-2000:]


def test_aliases_come_last_and_share_the_storage(tmp_path):
    grid = LazyTensor.of(GRID)
    write_torch(tmp_path / "a.pt", {"embedding": grid, "norm": LazyTensor.of(GRID[0])}, aliases={"head": "embedding"})
    tensors = read_torch(tmp_path / "a.pt")
    assert list(tensors) == ["embedding", "norm", "head"]
    assert np.shares_memory(tensors["embedding"].read_stored(), tensors["head"].read_stored())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert [name for name in archive.namelist() if "/data/" in name] == ["a/data/0", "a/data/1"]


def test_each_tensor_is_read_once_in_order_and_let_go(tmp_path):
    order, living = [], set()

    class Counted(np.ndarray):
        def __del__(self):
            living.discard(self.label)

    def tensor(name):
        def read():
            gc.collect()
            order.append((name, len(living)))
            array = np.zeros((2, 2), np.float32).view(Counted)
            array.label = name
            living.add(name)
            return array

        return LazyTensor("float32", (2, 2), read)

    Counted.label = None
    write_torch(tmp_path / "a.pt", {name: tensor(name) for name in "abc"}, aliases={"d": "a"})
    assert order == [("a", 0), ("b", 0), ("c", 0)]


def test_an_empty_state_dict(tmp_path):
    write_torch(tmp_path / "a.pt", {})
    assert read_torch(tmp_path / "a.pt") == {}


@pytest.mark.parametrize("name", ["größe.pt", "a\\b.pt"])
def test_a_file_name_that_cannot_name_the_folder(tmp_path, name):
    write_torch(tmp_path / name, {"w": LazyTensor.of(GRID)})
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert archive.namelist()[0] == "archive/data.pkl"
    assert list(read_torch(tmp_path / name)) == ["w"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def fail():
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_torch(path, {"w": LazyTensor.of(GRID), "x": LazyTensor("float32", (2,), fail)})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float32), np.zeros(3, np.float64), np.zeros(3, ">f4")])
def test_a_tensor_other_than_promised_is_not_written(tmp_path, array):
    with pytest.raises(TensorsError, match="tensor 'w': not the promised tensor"):
        write_torch(tmp_path / "a.pt", {"w": LazyTensor("float32", (3,), lambda: array)})
    assert list(tmp_path.iterdir()) == []


def test_all_that_cannot_be_written_comes_in_one_error(tmp_path):
    fine = LazyTensor.of(GRID)
    tensors = {
        "fine": fine,
        "wave": LazyTensor("complex64", (1,), lambda: np.zeros(1)),
        "deep": LazyTensor("float32", (1,) * 33, lambda: np.zeros(1)),
        "n" * 5000: fine,
        "half\ud800": fine,
    }
    with pytest.raises(TensorsError) as caught:
        write_torch(tmp_path / "a.pt", tensors, aliases={"fine": "wave", "lost": "nowhere", "chain": "lost"})
    assert len(caught.value.details) == 7
    assert "alias of 'nowhere', which is not there" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Reading.


def test_the_map_lives_as_long_as_an_array_and_is_read_only(tmp_path):
    write_torch(tmp_path / "a.pt", {"w": LazyTensor.of(GRID)})
    array = read_torch(tmp_path / "a.pt")["w"].read_stored()
    (tmp_path / "a.pt").unlink()
    gc.collect()
    np.testing.assert_array_equal(array, GRID)
    assert not array.flags.writeable


def test_a_file_without_the_small_members_and_with_others(tmp_path):
    specs = {"w": TensorSpec("int16", (2,), (1,), 0, "5", 2)}
    others = {"data/6": b"unused", "notes": b"?", "": b""}
    path = checkpoint(
        tmp_path / "a.pt", specs, {"5": b"\1\0\2\0"}, members=others, omit=("byteorder", "version"), folder="old"
    )
    assert values(read_torch(path)) == {"w": ("int16", [1, 2])}


def test_data_at_any_offset(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle_state_dict({"w": TensorSpec("float64", (2,), (1,), 0, "0", 2)}))
        archive.writestr("archive/data/0", struct.pack("<2d", 0.5, 1.5))
    assert values(read_torch(tmp_path / "a.pt")) == {"w": ("float64", [0.5, 1.5])}


def test_steps_never_taken_may_be_of_any_size(tmp_path):
    specs = {
        "w": TensorSpec("int16", (1, 2), (1 << 62, 1), 0, "0", 2),
        "e": TensorSpec("int16", (0, 9), (1, 1), 99, "0", 2),
    }
    tensors = read_torch(checkpoint(tmp_path / "a.pt", specs, {"0": b"\1\0\2\0"}))
    assert values(tensors) == {"w": ("int16", [[1, 2]]), "e": ("int16", [])}


def test_expanded_tensors_up_to_a_limit(tmp_path):
    count = MAX_EXPANDED_BYTES // 8
    path = checkpoint(tmp_path / "a.pt", {"w": TensorSpec("int64", (count,), (0,), 0, "0", 1)}, {"0": bytes(8)})
    assert read_torch(path)["w"].read_stored().strides == (0,)
    checkpoint(path, {"w": TensorSpec("int64", (count + 1,), (0,), 0, "0", 1)}, {"0": bytes(8)})
    with pytest.raises(FormatError, match="'w': expands 8 bytes to"):
        read_torch(path)


ONE = {"w": TensorSpec("int16", (2,), (1,), 0, "0", 2)}
BYTES = {"0": bytes(4)}
HOSTILE = {
    "storage missing": ((ONE, {}), {}, "'w': storage 0 is not in the file"),
    "storage too small": ((ONE, {"0": bytes(3)}), {}, "3 bytes instead of 4"),
    "storage too large": ((ONE, {"0": bytes(5)}), {}, "5 bytes instead of 4"),
    "storage of petabytes": (({"w": TensorSpec("int16", (1,), (1,), 0, "0", 1 << 50)}, BYTES), {}, "4 bytes instead"),
    "big-endian": ((ONE, BYTES), {"members": {"byteorder": b"big"}}, "byteorder: byte order .*found big"),
    "byte order unknown": ((ONE, BYTES), {"members": {"byteorder": b"\xff" * 5000}}, "byte order"),
    "version to come": ((ONE, BYTES), {"members": {"version": b"11\n"}}, "unknown version .*found 11"),
    "version not a number": ((ONE, BYTES), {"members": {"version": b"9" * 5000}}, "unknown version"),
    "TorchScript": ((ONE, BYTES), {"members": {"constants.pkl": b""}}, "TorchScript"),
    "no pickle": ((ONE, BYTES), {"omit": ("data.pkl",)}, "expected data.pkl"),
    "pickle elsewhere": ((ONE, BYTES), {"folder": "x/y"}, "expected data.pkl"),
    "folder of no name": ((ONE, BYTES), {"folder": "."}, "leads elsewhere"),
    "member of another folder": ((ONE, BYTES), {"members": {"../y/data.pkl": b""}}, "leads elsewhere"),
    "pickle too large": ((bytes((8 << 20) + 1), BYTES), {}, "data.pkl is too large"),
    "pickle empty": ((b"", BYTES), {}, "cut short"),
    "pickle of a number": ((b"\x80\x02K\1.", BYTES), {}, "not a state dict"),
    "pickle that calls": (
        (b"\x80\x02cos\nsystem\nX\4\0\0\0trueq\0\x85R.", BYTES),
        {},
        "'os.system'.*Nothing was executed",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_unsound_checkpoints_are_refused(tmp_path, case):
    arguments, options, message = HOSTILE[case]
    path = checkpoint(tmp_path / "a.pt", *arguments, **options)
    with pytest.raises(FormatError, match=message) as caught:
        read_torch(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000


def test_an_archive_of_two_folders_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle_state_dict({}))
        archive.writestr("b/data.pkl", pickle_state_dict({}))
    with pytest.raises(FormatError, match="expected 1 folder, found 2"):
        read_torch(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"P", "not a torch checkpoint"),
        (b"PK\5\6" + bytes(18), "not a torch"),
        (b"{}\n", "bytes 7b7d0a"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_torch(tmp_path / "a.pt")


def test_absent_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(FormatError, match="no such file"):
            read_torch(path)


# Damage anywhere: one FormatError, or values.


def read_or_refuse(path):
    """All values, or the refusal; anything else is raised."""
    try:
        return [tensor.read_stored().tobytes() for tensor in read_torch(path).values() if tensor.nbytes < 1 << 20]
    except FormatError as error:
        return str(error)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "a.pt"


edits = st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 4), st.binary(min_size=1, max_size=8)), max_size=4)


def edit(data, changes):
    for place, kind, piece in changes:
        at = place % (len(data) + 1)
        removed = (len(piece), 0, len(piece), 1 << 14, 1)[kind]
        data = data[:at] + (piece if kind != 2 else b"") + data[at + removed :]
    return data


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["tied", "contiguous", "views", "unsupported", "wrapped", "legacy", "legacy_views"]), edits)
def test_a_damaged_file_gives_a_format_error_or_values(damaged, name, changes):
    damaged.write_bytes(edit((FIXTURES / f"{name}.pt").read_bytes(), changes))
    assert len(read_or_refuse(damaged)) < 20_000


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["tied", "contiguous", "views", "unsupported", "wrapped"]), edits)
def test_a_damaged_pickle_in_a_sound_archive(damaged, name, changes):
    with zipfile.ZipFile(FIXTURES / f"{name}.pt") as archive:
        contents = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    contents["data.pkl"] = edit(contents["data.pkl"], changes)
    checkpoint(damaged, contents["data.pkl"], {}, members=contents)
    assert len(read_or_refuse(damaged)) < 20_000


# Against torch itself.


def torch_or_skip():
    return pytest.importorskip("torch")


@pytest.mark.parity
def test_torch_reads_what_we_write(tmp_path):
    torch = torch_or_skip()
    tensors = some_tensors()
    write_torch(tmp_path / "a.pt", tensors, aliases={"twin": "float32.(3, 4)"})
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "a.pt", weights_only=True, **options)
        assert list(loaded) == [*tensors, "twin"]
        for name, tensor in tensors.items():
            theirs = loaded[name]
            assert (str(theirs.dtype), tuple(theirs.shape)) == (f"torch.{tensor.dtype}", tensor.shape)
            assert theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.read_stored().tobytes()
        assert loaded["twin"].data_ptr() == loaded["float32.(3, 4)"].data_ptr()


@pytest.mark.parity
def test_we_read_what_torch_writes(tmp_path):
    torch = torch_or_skip()
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    saved = {
        **module.state_dict(),
        "view": base[1::2, 3:],
        "transposed": base.t(),
        "tied": base,
        "half": base.half().t(),
        "brain": base.bfloat16()[2:],
        "flag": base > 0,
        "parameter": torch.nn.Parameter(base[:2]),
        "expanded": base[0, 0].expand(5),
        "wide": (base * 100).to(torch.int32).to(torch.uint32),
    }
    torch.save(saved, tmp_path / "a.pt")
    torch.save(saved, io_bytes := io.BytesIO())
    (tmp_path / "stream.pt").write_bytes(io_bytes.getvalue())
    for path in (tmp_path / "a.pt", tmp_path / "stream.pt"):
        tensors = read_torch(path)
        assert list(tensors) == list(saved)
        for name, tensor in tensors.items():
            theirs = saved[name].detach()
            bits = theirs.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == "bfloat16" else theirs.numpy()
            np.testing.assert_array_equal(tensor.read_stored(), bits)
        assert np.shares_memory(tensors["view"].read_stored(), tensors["tied"].read_stored())


@pytest.mark.parity
def test_torch_files_without_crcs(tmp_path):
    torch = torch_or_skip()
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": 4096}):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"w": torch.arange(5)}, tmp_path / "a.pt")
        finally:
            torch.serialization.set_crc32_options(True)
    assert values(read_torch(tmp_path / "a.pt")) == {"w": ("int64", [0, 1, 2, 3, 4])}


@pytest.mark.parity
@pytest.mark.slow
def test_torch_files_beyond_4_gib(tmp_path):
    """Sparse: torch leaves the storages out, and none of them is touched."""
    torch = torch_or_skip()
    saved = {"a": torch.empty(5 << 30, dtype=torch.int8), "b": torch.empty(3, dtype=torch.int16)}
    with torch.serialization.skip_data():
        torch.save(saved, tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("rb+") as handle:
        handle.seek(read_member_offset(tmp_path / "a.pt", "a/data/1"))
        handle.write(struct.pack("<3h", 1, 2, 3))
    tensors = read_torch(tmp_path / "a.pt")
    assert tensors["b"].read_stored().tolist() == [1, 2, 3]
    assert tensors["a"].read_stored().shape == (5 << 30,)
    assert tensors["a"].read_stored()[-3:].tolist() == [0, 0, 0]


def read_member_offset(path, name):
    """Where a member's data begins, by the standard library."""
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo(name).header_offset
    with path.open("rb") as handle:
        handle.seek(header + 26)
        names, extras = struct.unpack("<HH", handle.read(4))
    return header + 30 + names + extras
