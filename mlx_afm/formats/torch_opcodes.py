"""A pickle interpreter that can build containers, numbers, text and torch tensors, and nothing else.

Byte layout (pickle protocol 2, the one torch writes): `80 02`, then one-byte opcodes with their arguments, up
to `.`. Accepted opcodes:

    containers   } ] ) ( t 85 86 87  dict, list, (), mark, tuples     u s a e  put into a dict or list
    values       N 88 89  None, True, False     K M J 8a  integers    G  float   X  UTF-8 text
    memo         q r  store     h j  fetch
    objects      c  name from the list below    R  call    b  set state    Q  storage from its persistent id

The only names are `torch_names.GLOBALS`: `collections.OrderedDict`, torch's three rebuild functions, its storage
types and its dtypes. They are looked up in that table and never imported; "calling" one builds a description.

Limits: `MAX_PICKLE_BYTES`, `MAX_OPCODES`, `MAX_TEXT_BYTES`, `MAX_NAME_BYTES`, `MAX_OPEN_MARKS`, `MAX_LONG_BYTES`,
`MAX_INTEGER_KEY`; memo numbers below `MAX_OPCODES`. Together they keep what a pickle can allocate under 64 MB, and the
time it takes proportional to its size (integers chosen freely could all fall into one slot of a hash table). Nothing
recurses, whatever the nesting; values are told apart by exact type and are never hashed or compared, dictionary keys
(text or integers) excepted. Storages of one key must agree in type and size.
Versions: another protocol, opcode or name is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any, NamedTuple, NoReturn

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_names import GLOBALS, RawStorage, called, kind_of, short, storage_of

MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 500_000  # a tensor takes about 40
MAX_TEXT_BYTES = 4096
MAX_NAME_BYTES = 128
MAX_OPEN_MARKS = 64
MAX_LONG_BYTES = 16
MAX_INTEGER_KEY = 1 << 20


class Limits(NamedTuple):
    """How long a pickle may be."""

    length_bytes: int = MAX_PICKLE_BYTES
    opcodes: int = MAX_OPCODES


_WIDEST = Limits()


def parse_pickle(
    data: bytes | mmap,
    where: object,
    start: int = 0,
    *,
    storages: dict[str, RawStorage] | None = None,
    limits: Limits = _WIDEST,
) -> tuple[object, int]:
    """The value of the pickle that begins at byte `start`, and the offset after it.

    Values are dict, list, tuple, str, int, float, bool, None, `Global`, `RawStorage` and `RawTensor`. `storages`, if
    given, is filled with every storage the pickle names, by key.

    Raises:
        FormatError: anything outside the module's rules, with its byte offset.
    """
    machine = _Machine(data, where, start, {} if storages is None else storages, limits)
    return machine.run(), machine.at


class _Machine:
    """Stack, marks and memo of one run; `at` is the next byte, `opcode_at` the opcode being run."""

    def __init__(
        self, data: bytes | mmap, where: object, start: int, storages: dict[str, RawStorage], limits: Limits
    ) -> None:
        self.data, self.where, self.at, self.opcode_at = data, where, start, start
        self.limits, self.end = limits, start + limits.length_bytes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self) -> object:
        if self.take(2) != b"\x80\x02":
            self.fault("not a pickle of protocol 2", advice="Re-save it with torch.save and its default protocol")
        for _ in range(self.limits.opcodes):
            self.opcode_at = self.at
            code = self.take(1)
            if code == b".":
                return self.result()
            step = _STEPS.get(code)
            if step is None:
                self.fault("pickle opcode not allowed", found=f"0x{code.hex()}")
            step(self)
        self.fault("too many pickle opcodes", expected=f"<= {self.limits.opcodes}")

    def fault(self, what: str, **facts: Any) -> NoReturn:
        raise FormatError(what, where=f"{self.where}, pickle byte {self.opcode_at}", **facts)

    def result(self) -> object:
        if len(self.stack) != 1 or self.marks:
            self.fault("pickle ends with a disordered stack", expected="1 value", found=len(self.stack))
        return self.stack[0]

    # Bytes.

    def take(self, count: int) -> bytes:
        if self.at + count > self.end:
            self.fault("pickle too large", expected=f"<= {self.limits.length_bytes} bytes")
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            self.fault("pickle is cut short", expected=f"{count} bytes", found=len(piece))
        self.at += count
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME_BYTES)
        if end < 0:
            self.fault("name without an end")
        text = self.data[self.at : end].decode("ascii", errors="backslashreplace")
        self.at = end + 1
        return text

    # Stack.

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fault("pickle takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            self.fault("pickle closes a group that it did not open")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self) -> None:
        if len(self.marks) >= MAX_OPEN_MARKS:
            self.fault("pickle nests too deeply", expected=f"<= {MAX_OPEN_MARKS} open groups")
        self.marks.append(len(self.stack))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    # Values.

    def long(self) -> None:
        count = self.number("<B")
        if count > MAX_LONG_BYTES:
            self.fault("integer too large", expected=f"<= {MAX_LONG_BYTES} bytes", found=count)
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def text(self) -> None:
        count = self.number("<I")
        if count > MAX_TEXT_BYTES:
            self.fault("text too long", expected=f"<= {MAX_TEXT_BYTES} bytes", found=count)
        try:
            self.stack.append(self.take(count).decode("utf-8"))
        except UnicodeDecodeError:
            self.fault("text is not UTF-8")

    def fetch(self, form: str) -> None:
        index = self.number(form)
        if index not in self.memo:
            self.fault("pickle fetches what it never stored", found=f"memo {index}")
        self.stack.append(self.memo[index])

    def store(self, form: str) -> None:
        index = self.number(form)
        if index >= MAX_OPCODES:
            self.fault("pickle stores under too high a number", expected=f"< {MAX_OPCODES}", found=f"memo {index}")
        self.memo[index] = self.top()

    # Containers.

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            self.fault("pickle appends to what is not a list", found=kind_of(target))
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            self.fault("pickle sets items of what is not a dictionary", found=kind_of(target))
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int):
                self.fault("dictionary key is neither text nor integer", found=kind_of(key))
            if type(key) is int and not 0 <= key <= MAX_INTEGER_KEY:
                self.fault("dictionary key out of range", expected=f"0 to {MAX_INTEGER_KEY}", found=key)
            if key in target:
                self.fault("dictionary key occurs twice", found=short(str(key)))
            target[key] = value

    # Objects.

    def name(self) -> None:
        module, name = self.line(), self.line()
        known = GLOBALS.get((module, name))
        if known is None:
            self.fault(
                "pickle names an object that a state dict does not need",
                found=short(f"{module}.{name}"),
                advice="Nothing was executed. Save plain tensors only: torch.save(model.state_dict(), path)",
            )
        self.stack.append(known)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(state) is not dict or type(target) is not dict:
            self.fault("pickle sets the state of what has none", found=kind_of(target))
        # The state of an OrderedDict is torch's `_metadata` (module versions); nothing here needs it.

    def storage(self) -> None:
        storage = storage_of(self.pop())
        if storage is None:
            self.fault("persistent id is not one of torch's storages")
        if self.storages.setdefault(storage.key, storage) != storage:
            self.fault("storage is named with two types or sizes", found=f"storage {storage.key}")
        self.stack.append(storage)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        result = called(function, arguments)
        if result is None:
            self.fault("pickle calls something as torch would not", found=kind_of(function))
        self.stack.append(result)


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"(": _Machine.mark,
    b"t": lambda m: m.stack.append(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"K": lambda m: m.stack.append(m.number("<B")),
    b"M": lambda m: m.stack.append(m.number("<H")),
    b"J": lambda m: m.stack.append(m.number("<i")),
    b"\x8a": _Machine.long,
    b"G": lambda m: m.stack.append(m.number(">d")),
    b"X": _Machine.text,
    b"q": lambda m: m.store("<B"),
    b"r": lambda m: m.store("<I"),
    b"h": lambda m: m.fetch("<B"),
    b"j": lambda m: m.fetch("<I"),
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.storage,
}
