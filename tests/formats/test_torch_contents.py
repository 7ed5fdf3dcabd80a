"""Which dictionary of a checkpoint is the state dict."""

from pathlib import Path

import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_file import read_torch, read_torch_checkpoint
from mlx_afm.formats.torch_names import RawStorage, RawTensor
from mlx_afm.formats.torch_pickle import WRAPPER_KEYS, unwrap
from torch_builders import dictionary, plain, tensor, whole, zip_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
TENSOR = RawTensor("float32", RawStorage("float32", "0", 2), 0, (2,), (1,))
STATE = {"w": TENSOR}


@pytest.mark.parametrize("key", WRAPPER_KEYS)
def test_the_state_dict_under_each_known_key(key):
    beside = {"epoch": 3, "lr": 0.5, "note": "é", "best": None, "args": {"a": [1, (2, {})]}, "optimizer": {0: TENSOR}}
    assert unwrap({**beside, key: STATE}, "x") == (STATE, key)
    assert unwrap({key: STATE}, "x") == (STATE, key)


@pytest.mark.parametrize("value", [STATE, {}, {"model": TENSOR, "weights": TENSOR}])
def test_a_dictionary_of_tensors_is_the_state_dict(value):
    assert unwrap(value, "x") == (value, None)


@pytest.mark.parametrize(
    "value", [None, [STATE], {"model": 3}, {"net": STATE}, {"model": {"state_dict": STATE}}, {"model": {}, "epoch": 1}]
)
def test_where_none_is_found_the_value_is_left_to_be_refused(value):
    assert unwrap(value, "x") == (value, None)


def test_an_empty_dictionary_beside_is_no_second_state_dict():
    assert unwrap({"module": {}, "model": STATE, "weights": {"w": 3}}, "x") == (STATE, "model")


def test_two_state_dicts_are_refused_by_name():
    with pytest.raises(FormatError, match=r"x: several state dicts .*found 'state_dict', 'model'\).*\['state_dict'\]"):
        unwrap({"model": STATE, "state_dict": STATE}, "x")


def test_files_by_torch_say_which_key_was_taken():
    taken = {
        path.stem: read_torch_checkpoint(path).wrapper_key
        for path in FIXTURES.glob("*.pt")
        if path.stem != "unsupported"
    }
    wrapped = {"wrapped": "state_dict", "training": "model", "legacy_training": "model"}
    assert taken == dict.fromkeys(taken) | wrapped
    assert read_torch(FIXTURES / "wrapped.pt")["w"].read_stored().tolist() == [[0, 1]]
    weights = read_torch(FIXTURES / "training.pt")
    assert weights["head.weight"].read_stored().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_what_is_wrong_inside_names_the_key(tmp_path):
    body = dictionary(epoch=plain(3), model=dictionary(w=tensor(), extra=plain([1])))
    (tmp_path / "a.pt").write_bytes(zip_checkpoint(whole(body), {"0": bytes(4)}))
    with pytest.raises(FormatError, match=r"data\.pkl, 'model': not a plain state dict.*\n  'extra': list"):
        read_torch(tmp_path / "a.pt")


def test_without_a_known_key_the_keys_are_named(tmp_path):
    body = dictionary(epoch=plain(3), net=dictionary(w=tensor()))
    (tmp_path / "a.pt").write_bytes(zip_checkpoint(whole(body), {"0": bytes(4)}))
    with pytest.raises(FormatError, match=r"found keys 'epoch', 'net'\)\. Save the dictionary"):
        read_torch(tmp_path / "a.pt")
