"""The interpreter: what it accepts, and that nothing else runs, recurses or fills memory."""

import mmap
import pickle
import tracemalloc
from collections import OrderedDict

import pytest

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_names import GLOBALS, Global, RawStorage, RawTensor
from mlx_afm.formats.torch_opcodes import MAX_OPCODES, MAX_PICKLE_BYTES, parse_pickle
from torch_builders import HOOKS, START, STORAGE, TENSOR


def parse(body):
    return parse_pickle(START + body, "some.pt")[0]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, (), [], {}, "", "é𝄞", 0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, 2**63, -(2**63)),
        *((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [1], [1, "a", None], 0.5, {"a": 1}, {"a": (1, [2]), 3: {}}),
        OrderedDict(),
        OrderedDict(a=1, b=2),
        ["same", ("same",)] * 3,
        {str(number): number for number in range(2500)},
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_are_those_of_the_standard_library(value):
    data = pickle.dumps(value, protocol=2)
    assert parse_pickle(data, "x") == (value, len(data))
    assert list(parse_pickle(data, "x")[0]) == list(value) if isinstance(value, dict) else True


def test_pickles_in_a_row_are_read_one_by_one():
    first, second = pickle.dumps([1], protocol=2), pickle.dumps({"a": 2}, protocol=2)
    value, end = parse_pickle(first + second, "x")
    assert (value, end) == ([1], len(first))
    assert parse_pickle(first + second, "x", end) == ({"a": 2}, len(first + second))


def test_tensors_become_descriptions():
    expected = RawTensor("float32", RawStorage("float32", "7", 6), 1, (2, 3), (3, 1))
    assert parse(TENSOR + b".") == expected
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + TENSOR + b"\x88" + HOOKS + b"\x87R."
    assert parse(parameter) == expected


def test_new_dtypes_come_as_untyped_storage_and_a_name():
    body = TENSOR.replace(b"tensor_v2", b"tensor_v3").replace(b"torch\nFloat", b"torch.storage\nUntyped")
    body = body.removesuffix(b"tR") + b"ctorch\nuint16\ntR."
    assert parse(body) == RawTensor("uint16", RawStorage(None, "7", 6), 1, (2, 3), (3, 1))


def test_a_storage_may_have_the_sixth_element_of_the_legacy_form():
    assert parse(STORAGE.removesuffix(b"tQ") + b"NtQ.") == RawStorage("float32", "7", 6)


def test_metadata_is_dropped():
    assert parse(HOOKS + b"}X\x09\0\0\0_metadata}sb.") == {}


def test_names_are_looked_up_and_never_imported():
    assert parse(b"ctorch\nBFloat16Storage\n.") == Global("storage", "bfloat16")
    assert {module for module, _ in GLOBALS} == {"collections", "torch._utils", "torch.storage", "torch"}


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def call(name, arguments):
    return b"ctorch._utils\n" + name + b"\n" + arguments + b"R."


TUPLE_BOMB = b"(" + b"K\1" * 1000 + b"tq\0" + b"(" + b"h\0" * 1000 + b"tq\1" + b"(" + b"h\1" * 1000 + b"t"
HOSTILE = {
    "nothing": (b"", "cut short"),
    "no end": (b"K\1", "cut short"),
    "a call of exec": (pickle.dumps(Runs(), protocol=2)[2:], "exec"),
    "os.system": (b"cposix\nsystem\nX\4\0\0\0true\x85R.", "posix.system"),
    "torch.load": (b"ctorch\nload\n.", "torch.load"),
    "a name that is almost allowed": (b"ccollections\nOrderedDict.__init__\n.", "OrderedDict.__init__"),
    "name without end": (b"c" + b"a" * 5000, "name without an end"),
    "name not ASCII": (b"c\xff\n\xfe\n.", "does not need"),
    "instruction INST": (b"(iposix\nsystem\n.", "0x69"),
    "instruction OBJ": (b"(o.", "0x6f"),
    "instruction NEWOBJ": (HOOKS + b")\x81.", "0x81"),
    "instruction EXT1": (b"\x82\1.", "0x82"),
    "instruction PERSID": (b"Pabc\n.", "0x50"),
    "instruction INT": (b"I" + b"9" * 5000 + b"\n.", "0x49"),
    "instruction LONG4": (b"\x8b\xff\xff\xff\x7f.", "0x8b"),
    "instruction BINUNICODE8": (b"\x8d" + b"\xff" * 8, "0x8d"),
    "instruction BYTEARRAY8": (b"\x96" + b"\xff" * 8, "0x96"),
    "instruction DUP": (b"K\x012.", "0x32"),
    "second PROTO": (b"\x80\x02K\1.", "0x80"),
    "empty stack": (b".", "disordered"),
    "two values": (b"NN.", "disordered"),
    "open mark": (b"N(.", "disordered"),
    "pop beyond the mark": (b"N(\x85.", "empty stack"),
    "pop of nothing": (b"\x87.", "empty stack"),
    "tuple without mark": (b"Nt.", "did not open"),
    "items without mark": (b"}u.", "did not open"),
    "items of a list": (b"](NNu.", "not a dictionary"),
    "items of a tensor": (TENSOR + b"X\1\0\0\0aNs.", "not a dictionary"),
    "odd items": (b"}(Nu.", "not a dictionary"),
    "appending to a dictionary": (b"}Na.", "not a list"),
    "appending to a tuple": (b")(NNe.", "not a list"),
    "list as key": (b"}]Ns.", "neither text nor integer"),
    "tuple as key": (b"})Ns.", "neither text nor integer"),
    "nested tuple as key": (b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "neither text nor integer"),
    "key twice": (b"}(X\1\0\0\0aNX\1\0\0\0aNu.", "occurs twice"),
    "memo never stored": (b"h\0.", "memo 0"),
    "memo far away": (b"Nq\0j\xff\xff\xff\xff.", "memo 4294967295"),
    "memo of nothing": (b"q\0.", "empty stack"),
    "text longer than the file": (b"X\xff\xff\xff\xff.", "text too long"),
    "text cut": (b"X\xff\0\0\0ab.", "cut short"),
    "text not UTF-8": (b"X\1\0\0\0\xff.", "not UTF-8"),
    "text of half a pair": (b"X\3\0\0\0\xed\xa0\x80.", "not UTF-8"),
    "integer of 255 bytes": (b"\x8a\xff" + b"\xff" * 255 + b".", "integer too large"),
    "open groups": (b"(" * 1000 + b"t" * 1000 + b".", "nests too deeply"),
    "too many opcodes": (b"N" * (MAX_OPCODES + 1), "too many"),
    "state of a number": (b"K\1}b.", "has none"),
    "state that is no dictionary": (HOOKS + b")b.", "has none"),
    "call of a number": (b"K\1)R.", "as torch would not"),
    "call of a storage type": (b"ctorch\nFloatStorage\n)R.", "as torch would not"),
    "call of a dtype": (b"ctorch\nfloat32\n)R.", "as torch would not"),
    "call without a tuple": (b"ccollections\nOrderedDict\n]R.", "as torch would not"),
    "dictionary of arguments": (b"ccollections\nOrderedDict\n]\x85R.", "as torch would not"),
    "tensor of nothing": (call(b"_rebuild_tensor_v2", b")"), "as torch would not"),
    "tensor of too few": (TENSOR.replace(b"\x89" + HOOKS, b"\x89") + b".", "as torch would not"),
    "tensor with hooks": (TENSOR.removesuffix(b"tR") + b"X\1\0\0\0aNstR.", "as torch would not"),
    "tensor of true rows": (TENSOR.replace(b"K\2K\3\x86", b"\x88K\3\x86") + b".", "as torch would not"),
    "tensor of text": (TENSOR.replace(b"K\1K\2", b"X\1\0\0\0aK\2") + b".", "as torch would not"),
    "tensor of 33 dimensions": (TENSOR.replace(b"K\2K\3\x86", b"(" + b"K\1" * 33 + b"t") + b".", "as torch would not"),
    "untyped tensor, version 2": (TENSOR.replace(b"torch\nFloat", b"torch.storage\nUntyped") + b".", "as torch"),
    "typed tensor, version 3": (
        TENSOR.replace(b"_v2", b"_v3").removesuffix(b"tR") + b"ctorch\nuint16\ntR.",
        "as torch would not",
    ),
    "tensor, version 3, without dtype": (TENSOR.replace(b"_v2", b"_v3") + b".", "as torch would not"),
    "parameter of a number": (call(b"_rebuild_parameter", b"K\1\x88" + HOOKS + b"\x87"), "as torch would not"),
    "storage of a number": (b"K\1Q.", "persistent id"),
    "storage of a short tuple": (b"X\7\0\0\0storage\x85Q.", "persistent id"),
    "storage of other kind": (STORAGE.replace(b"storagec", b"storagfc") + b".", "persistent id"),
    "storage of a dtype": (STORAGE.replace(b"FloatStorage", b"float32") + b".", "persistent id"),
    "storage of true elements": (STORAGE.replace(b"K\x06", b"\x88") + b".", "persistent id"),
    "storage outside the folder": (STORAGE.replace(b"\1\0\0\x007", b"\7\0\0\0../../x") + b".", "persistent id"),
    "storage with a view": (STORAGE.removesuffix(b"tQ") + b")tQ.", "persistent id"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_everything_else_is_refused_with_its_byte(case):
    body, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as caught:
        parse(body)
    assert "some.pt, pickle byte " in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused_with_advice(protocol):
    with pytest.raises(FormatError, match=r"not a pickle of protocol 2.*torch\.save"):
        parse_pickle(pickle.dumps({"a": 1}, protocol=protocol), "x")


def test_a_pickle_that_holds_itself_does_not_recurse():
    for value in (parse(b"}q\0X\1\0\0\0ah\0s."), parse(b"]q\0h\0a."), parse(b"]q\0(h\0\x85h\0e.")):
        assert type(value) in (dict, list)


def test_a_tower_of_tuples_does_not_recurse():
    assert type(parse(b")" + b"\x85" * 100_000 + b".")) is tuple


def test_every_prefix_of_a_pickle_is_refused():
    whole = START + TENSOR + b"."
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            parse_pickle(whole[:length], "x")


def test_a_pickle_beyond_the_limit_is_not_finished():
    text = b"X\0\x10\0\0" + b"a" * 4096
    with pytest.raises(FormatError, match="pickle too large"):
        parse(text * (MAX_PICKLE_BYTES // len(text) + 1))


def test_pickles_are_read_from_a_map(tmp_path):
    (tmp_path / "a").write_bytes(b"..." + START + TENSOR + b".")
    with (tmp_path / "a").open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        value, end = parse_pickle(data, "x", 3)
    assert (value, end) == (parse(TENSOR + b"."), 6 + len(TENSOR))


def test_storages_are_told_by_key():
    storages = {}
    body = b"(" + TENSOR + TENSOR + STORAGE.replace(b"7X", b"8X") + b"t."
    parse_pickle(START + body, "x", storages=storages)
    assert storages == {key: RawStorage("float32", key, 6) for key in "78"}


@pytest.mark.parametrize("change", [(b"FloatStorage", b"IntStorage"), (b"K\x06tQ", b"K\x07tQ")])
def test_a_storage_of_two_types_or_sizes_is_refused(change):
    with pytest.raises(FormatError, match=r"two types or sizes.*storage 7"):
        parse(b"(" + TENSOR + TENSOR.replace(*change) + b"t.")


def test_keys_and_memo_numbers_cannot_be_made_to_collide():
    """All these keys have the hash 0 in CPython; a table of them takes time by their number squared."""
    keys = b"".join(b"\x8a\x10" + (number * (2**61 - 1)).to_bytes(16, "little") + b"N" for number in range(1, 9))
    with pytest.raises(FormatError, match="dictionary key out of range"):
        parse(b"}(" + keys + b"u.")
    with pytest.raises(FormatError, match=r"too high a number .*memo 500000"):
        parse(b"Nr" + MAX_OPCODES.to_bytes(4, "little") + b".")


WIDE_TEXT = "\U0001d11e".encode() + b"a" * 4092  # four bytes a letter in memory
BOMBS = {
    "dicts": lambda count: b"}" * count,
    "memo": lambda count: b"".join(b"}r" + number.to_bytes(4, "little") for number in range(count // 2)),
    "lists": lambda count: b"]Na" * (count // 3),
    "items": lambda count: b"}K\1Ns" * (count // 4),
    "integers": lambda count: (b"\x8a\x10" + b"\x7f" * 16) * min(count, count * MAX_PICKLE_BYTES // MAX_OPCODES // 18),
    "texts": lambda count: (b"X\4\0\0\0" + WIDE_TEXT[:4]) * count,
    "wide texts": lambda count: (b"X\0\x10\0\0" + WIDE_TEXT) * (count * MAX_PICKLE_BYTES // MAX_OPCODES // 4101),
    "storages": lambda count: STORAGE.removesuffix(b"Q") + b"q\0" + b"h\0Q" * (count // 2),
    "tensors": lambda count: (
        TENSOR.removesuffix(b"R").replace(b"_v2\n", b"_v2\nq\0") + b"q\1" + b"h\0h\1R" * (count // 3)
    ),
    "shared tuples": lambda count: TUPLE_BOMB,
}


def peak_bytes(body):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            parse(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_is_bounded(bomb):
    """A twentieth of the largest pickle, since tracing memory is slow."""
    assert 20 * peak_bytes(BOMBS[bomb](MAX_OPCODES // 20)) < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_is_bounded_at_full_size(bomb):
    assert peak_bytes(BOMBS[bomb](MAX_OPCODES - 100)) < 64 << 20
