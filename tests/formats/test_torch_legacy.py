"""The legacy form: files by torch (`make_torch_fixtures.py`) hold what their zip twins hold, and stay lazy."""

import gc
from pathlib import Path

import numpy as np
import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.tensors import STORAGE_DTYPES
from mlx_afm.formats.torch_file import read_torch, read_torch_checkpoint
from torch_builders import dictionary, legacy_checkpoint, plain, tensor

FIXTURES = Path(__file__).parent / "fixtures"


def values(tensors):
    return {name: (tensor.dtype, tensor.shape, tensor.read_stored().tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["contiguous", "views", "training"])
def test_what_the_zip_form_holds(name):
    """`test_torch_file.py` states the values; here are the same dtypes, views, scalars, parameters and ties."""
    old, new = (read_torch_checkpoint(FIXTURES / f"{form}{name}.pt") for form in ("legacy_", ""))
    assert (old.form, new.form) == ("legacy", "zip")
    assert old.wrapper_key == new.wrapper_key
    assert list(old.tensors) == list(new.tensors)
    assert values(old.tensors) == values(new.tensors)


def test_the_smallest_file():
    tensors = read_torch(FIXTURES / "legacy.pt")
    assert values(tensors) == {"w": ("float32", (1, 2), np.array([0, 1], np.float32).tobytes())}


def test_every_dtype_is_there():
    dtypes = {tensor.dtype for tensor in read_torch(FIXTURES / "legacy_contiguous.pt").values()}
    assert dtypes == set(STORAGE_DTYPES)


def test_views_share_the_file_s_bytes_and_cannot_be_written(tmp_path):
    (tmp_path / "a.pt").write_bytes((FIXTURES / "legacy_views.pt").read_bytes())
    arrays = {name: tensor.read_stored() for name, tensor in read_torch(tmp_path / "a.pt").items()}
    (tmp_path / "a.pt").unlink()
    gc.collect()
    for name in ("same", "transposed", "middle", "every_other", "repeated"):
        assert np.shares_memory(arrays["base"], arrays[name])
    assert not any(array.flags.writeable for array in arrays.values() if array.size)
    np.testing.assert_array_equal(arrays["middle"], np.arange(24).reshape(4, 6)[1:3, 2:5])


def test_storages_in_any_order_and_odd_places(tmp_path):
    """Storage "1" has 3 bytes, so "7" begins at an odd offset."""
    body = dictionary(
        b=tensor("DoubleStorage", key="7", legacy=True),
        a=tensor("CharStorage", key="1", numel=3, offset=1, legacy=True),
        empty=tensor("FloatStorage", key="70", numel=0, shape=(0,), legacy=True),
    )
    storages = {"1": (3, b"\1\2\3"), "7": (2, np.array([0.5, 1.5]).tobytes()), "70": (0, b"")}
    (tmp_path / "a.pt").write_bytes(legacy_checkpoint(body, storages))
    tensors = read_torch(tmp_path / "a.pt")
    assert {name: value.read_stored().tolist() for name, value in tensors.items()} == {
        "b": [0.5, 1.5],
        "a": [2, 3],
        "empty": [],
    }


def test_storages_beside_the_state_dict_are_passed_over(tmp_path):
    """Of dtypes, too, that a state dict here cannot have."""
    beside = dictionary(step=tensor("ComplexDoubleStorage", key="1", numel=1, shape=(), strides=(), legacy=True))
    body = dictionary(weights=dictionary(w=tensor(key="2", legacy=True)), extra=beside, epoch=plain(3))
    (tmp_path / "a.pt").write_bytes(legacy_checkpoint(body, {"1": (1, bytes(16)), "2": (2, b"\1\0\2\0")}))
    checkpoint = read_torch_checkpoint(tmp_path / "a.pt")
    assert checkpoint.wrapper_key == "weights"
    assert checkpoint.tensors["w"].read_stored().tolist() == [1, 2]


def test_every_shortened_or_longer_file_is_refused(tmp_path):
    whole = (FIXTURES / "legacy_training.pt").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_torch(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="bytes after the last storage"):
        read_torch(tmp_path / "a.pt")


def test_reading_touches_no_values(tmp_path):
    """A sparse file of 6 GB."""
    numel = 6 << 30
    data = legacy_checkpoint(
        dictionary(w=tensor("ByteStorage", numel=numel, shape=(numel,), legacy=True)), {"0": (numel, b"")}
    )
    with (tmp_path / "a.pt").open("wb") as handle:
        handle.write(data)
        handle.truncate(len(data) + numel)
    array = read_torch(tmp_path / "a.pt")["w"].read_stored()
    assert array.shape == (numel,)
    assert array[-3:].tolist() == [0, 0, 0]


@pytest.mark.parity
@pytest.mark.parametrize("old", [False, True])
def test_values_are_those_torch_saved(tmp_path, old):
    """Compared with what was saved: torch cannot load its own legacy files with unsigned tensors of 16 bits or more."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    saved = {
        "view": base[1::2, 3:],
        "transposed": base.t(),
        "tied": base,
        "half": base.half().t(),
        "brain": base.bfloat16()[2:],
        "flag": base > 0,
        "parameter": torch.nn.Parameter(base[:2]),
        "expanded": base[0, 0].expand(5),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "wide": (base * 100).to(torch.int32).to(torch.uint32),
        "small": (base * 100).to(torch.int16).to(torch.uint16).t(),
    }
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": base.double()}}, "betas": (0.5, 0.75)}
    torch.save(
        {"model_state_dict": saved, "optimizer": optimizer, "epoch": 3, "note": None},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not old,
    )
    checkpoint = read_torch_checkpoint(tmp_path / "a.pt")
    assert (checkpoint.form, checkpoint.wrapper_key) == ("legacy" if old else "zip", "model_state_dict")
    assert list(checkpoint.tensors) == list(saved)
    for name, ours in checkpoint.tensors.items():
        expected = saved[name].detach()
        assert (f"torch.{ours.dtype}", ours.shape) == (str(expected.dtype), tuple(expected.shape))
        assert ours.read_stored().tobytes() == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert np.shares_memory(checkpoint.tensors["view"].read_stored(), checkpoint.tensors["tied"].read_stored())
