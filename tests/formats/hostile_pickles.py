"""Pickles made to do harm, that either form of checkpoint can carry: name -> (opcodes, what the refusal says)."""

import os
import struct

from mlx_afm.formats.torch_opcodes import MAX_OPCODES
from torch_builders import HOOKS, TENSOR, dictionary, plain, tensor

COMMAND = "touch canary; touch ../canary"


class Reduced:
    """Pickled by the standard library: a REDUCE of any callable."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calling(name, *arguments):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + plain(arguments) + b"R"


# Pickles that would run code in Python's own unpickler, and what the refusal says.
EXECUTIONS = {
    "os.system by REDUCE": (calling("os.system", COMMAND), "os.system"),
    "posix.system by REDUCE": (calling("posix.system", COMMAND), "posix.system"),
    "builtins.eval": (calling("builtins.eval", f"__import__('os').system('{COMMAND}')"), "builtins.eval"),
    "__builtin__.exec, its name in Python 2": (calling("__builtin__.exec", "open('canary', 'w')"), "__builtin__.exec"),
    "subprocess.Popen": (calling("subprocess.Popen", ["touch", "canary"]), "subprocess.Popen"),
    "runpy.run_path": (calling("runpy.run_path", "data.pkl"), "runpy.run_path"),
    "open for writing": (calling("io.open", "canary", "w"), "io.open"),
    "STACK_GLOBAL": (
        plain("os") + plain("system") + b"\x93" + plain((COMMAND,)) + b"R",
        "opcode not allowed .*0x58|93",
    ),
    "INST": (b"(" + plain(COMMAND) + b"ios\nsystem\n", "opcode not allowed .*0x69"),
    "OBJ": (b"(cos\nsystem\n" + plain(COMMAND) + b"o", "os.system"),
    "OBJ of an allowed name": (b"(ccollections\nOrderedDict\no", "opcode not allowed .*0x6f"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "opcode not allowed .*0x81"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92", "opcode not allowed .*0x92"),
    "extension code EXT1": (b"\x82\x01", "opcode not allowed .*0x82"),
    "extension code EXT4": (b"\x84\x01\0\0\0", "opcode not allowed .*0x84"),
    "copyreg._reconstructor": (calling("copyreg._reconstructor", 1, 2, 3), "copyreg._reconstructor"),
    "copyreg.add_extension": (calling("copyreg.add_extension", "os", "system", 1), "copyreg.add_extension"),
    "functools.partial": (b"cfunctools\npartial\n", "functools.partial"),
    "__reduce__ by the standard library": (plain(Reduced(os.system, COMMAND)), "system"),
    "__reduce__ nested in a state dict": (dictionary(w=tensor(), x=plain(Reduced(eval, "1"))), "eval"),
    "attribute of an allowed function": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
    "torch.load of another file": (calling("torch.load", "other.pt"), "torch.load"),
    "torch.hub.load": (calling("torch.hub.load", "a/b", "c"), "torch.hub.load"),
    "module by a torch storage's name": (b"cevil\nFloatStorage\n", "evil.FloatStorage"),
    "class state by BUILD": (tensor() + plain({"__class__": 1}) + b"b", "state of what has none"),
    "call of a storage type, which would allocate": (b"ctorch\nFloatStorage\n" + plain((1 << 40,)) + b"R", "as torch"),
    "call of a call's result": (HOOKS + plain(()) + b"R", "as torch would not"),
    "persistent id as text": (b"Pos.system\n", "opcode not allowed .*0x50"),
    "persistent id of a module": (plain(("module", 1, 2, 3)) + b"Q", "not one of torch's storages"),
}

TUPLE_BOMB = b"(" + b"K\1" * 1000 + b"tq\0" + b"".join(b"(" + b"h%c" % n * 1000 + b"tq%c" % (n + 1) for n in range(3))
COLLIDING_KEYS = b"".join(b"\x8a\x10" + (n * (2**61 - 1)).to_bytes(16, "little") + b"N" for n in range(1, 99_999))
PICKLES = {
    "dictionary that holds itself": (b"}q\0" + plain("state_dict") + b"h\0s", "not a plain state dict"),
    "list that holds itself": (b"]q\0h\0a", "not a state dict"),
    "dictionary as its own state": (HOOKS + b"q\0h\0b" + plain("a") + b"h\0s", "not a plain state dict"),
    "memo never stored": (b"h\x07", "fetches what it never stored"),
    "memo numbers that collide": (b"Nr" + struct.pack("<I", 1 << 31), "too high a number"),
    "memo bomb: tuples of tuples, 1000^4 items": (TUPLE_BOMB, "disordered stack"),
    "memo bomb: half a million dictionaries": (b"}q\0" * (MAX_OPCODES // 2 + 1), "too many pickle opcodes"),
    "memo bomb: every dictionary kept": (
        b"".join(b"}r" + struct.pack("<I", number) for number in range(MAX_OPCODES // 2)),
        "too many pickle opcodes",
    ),
    "text bomb: 8 MB in wide letters": ((b"X\0\x10\0\0" + "\U0001d11e".encode() + b"a" * 4092) * 2040, "disordered"),
    "marks nested a thousand deep": (b"(" * 1000 + b"t" * 1000, "nests too deeply"),
    "tuples nested a hundred thousand deep": (b")" + b"\x85" * 100_000, "not a state dict"),
    "lists nested in a state dict": (dictionary(w=b"]" * 60 + b"a" * 59), "not a plain state dict"),
    "integer keys that collide": (b"}(" + COLLIDING_KEYS + b"u", "dictionary key out of range"),
    "text of 4 GB": (b"X\xff\xff\xff\xff", "text too long"),
    "integer of 2 GB": (b"\x8b\xff\xff\xff\x7f", "opcode not allowed .*0x8b"),
    "bytearray of 2^64 bytes": (b"\x96" + b"\xff" * 8, "opcode not allowed .*0x96"),
    "name without an end": (b"c" + b"a" * 100_000, "name without an end"),
    "key twice": (b"}(" + plain("w") + TENSOR + plain("w") + TENSOR + b"u", "occurs twice"),
    "two state dicts under known keys": (
        dictionary(model=dictionary(w=tensor()), weights=dictionary(w=tensor())),
        "several state dicts .*'model', 'weights'",
    ),
}

TENSORS = {
    "numel negative": ({"numel": -2}, "negative size, stride, offset or storage"),
    "numel huge": ({"numel": 1 << 62}, "storage 0 has 4 bytes instead of"),
    "numel of 128 bits": ({"numel": 1 << 126}, "storage 0 has 4 bytes instead of"),
    "numel of 800 bits": ({"numel": 1 << 800}, "integer too large"),
    "offset negative": ({"offset": -1}, "negative size"),
    "offset huge": ({"offset": 1 << 63}, "reaches element 9223372036854775809"),
    "stride negative": ({"strides": (-1,)}, "negative size"),
    "stride huge": ({"strides": (1 << 63,)}, "reaches element 9223372036854775808"),
    "strides that wrap around 2^64": ({"strides": ((1 << 64) + 1,)}, "reaches element 18446744073709551617"),
    "shape negative": ({"shape": (-2,)}, "negative size"),
    "shape of two negatives": ({"shape": (-1, -2), "strides": (2, 1)}, "negative size"),
    "shape huge, strides of 0": ({"shape": (1 << 40,), "strides": (0,)}, "expands 4 bytes to"),
    "product of sizes is 2 modulo 2^64": (
        {"shape": ((1 << 63) + 1, 2), "strides": (0, 1)},
        "more than 281474976710656 elements",
    ),
    "empty, yet of huge size": ({"shape": (0, 1 << 62), "strides": (1, 1)}, "more than 281474976710656 elements"),
    "more strides than sizes": ({"strides": (1, 1)}, "1 sizes but 2 strides"),
    "33 dimensions": ({"shape": (1,) * 33, "strides": (1,) * 33}, "as torch would not"),
    "sizes that are true": ({"shape": (True,)}, "as torch would not"),
    "size by float": ({"shape": (2.0,)}, "as torch would not"),
    "key is a path": ({"key": "../../../etc/passwd"}, "not one of torch's storages"),
    "key is negative": ({"key": "-1"}, "not one of torch's storages"),
    "key in other digits": ({"key": "\u0660"}, "not one of torch's storages"),
    "key of 21 digits": ({"key": "0" * 21}, "not one of torch's storages"),
    "key with NUL": ({"key": "0\0"}, "not one of torch's storages"),
    "key of another member": ({"key": "1"}, "storage 1 is not in the file"),
    "quantized dtype": ({"kind": "QInt8Storage"}, "dtype qint8 is not supported"),
}

SHARED = {
    "storage shared under two dtypes": {"kind": "HalfStorage"},
    "storage shared in two sizes": {"numel": 3},
}
