"""Mutants of checkpoint files: of their bytes, and of the structure those bytes have.

Every mutation takes a `random.Random` and the bytes, and gives other bytes. `mutant(fixtures, seed, index)` is always
the same mutant, so that a number is enough to see one again.
"""

import io
import pickletools
import random
import struct
import zipfile

from torch_builders import zip_checkpoint

ODD_INTEGERS = (
    *(0, 1, 2, 127, 128, 255, 256, 32767, 65535),
    *(1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1),
)
# Opcodes that the reader takes, and some that it must not.
ODD_OPCODES = tuple(b"}])(tuseaN\x88\x89QRb.q\0h\0K\1\x85\x86\x87") + tuple(b"02iocB\x81\x82\x93\x95P\x8b")
# Form of a record's fields, by the signature that begins it.
ZIP_RECORDS = {
    b"PK\3\4": "<4x5H3I2H",
    b"PK\1\2": "<4x6H3I5H2I",
    b"PK\6\6": "<4xQ2H2I4Q",
    b"PK\6\7": "<4xIQI",
    b"PK\5\6": "<4x4H2IH",
}
LEGACY_PICKLES = 5


def flip(rng, data):
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng, data):
    at, piece = rng.randrange(len(data)), rng.randbytes(rng.randint(1, 8))
    return data[:at] + piece + data[at + len(piece) :]


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def remove(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 64) :]


def insert(rng, data):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def copy_block(rng, data):
    start, at = rng.randrange(len(data)), rng.randrange(len(data) + 1)
    block = data[start : start + rng.randint(1, 200)]
    return data[:at] + block + data[at + (len(block) if rng.random() < 0.5 else 0) :]


def put_integer(rng, data):
    """An odd integer anywhere, in any width."""
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(len(data) - width, 1))
    value = rng.choice((*ODD_INTEGERS, len(data), len(data) - 1)) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def zip_field(rng, data):
    """Another value in one field of one zip record."""
    places = [(at, form) for sign, form in ZIP_RECORDS.items() for at in _every(data, sign)]
    if not places:
        return flip(rng, data)
    at, form = rng.choice(places)
    fields = list(struct.unpack_from(form, data.ljust(at + struct.calcsize(form), b"\0"), at))
    kinds = [kind for count, kind in _kinds(form) for _ in range(count)]
    chosen = rng.randrange(len(fields))
    odd = rng.choice((*ODD_INTEGERS, fields[chosen] + 1, fields[chosen] - 1, fields[chosen] ^ 8, len(data), at))
    fields[chosen] = odd % (1 << 8 * struct.calcsize(kinds[chosen]))
    changed = bytearray(data.ljust(at + struct.calcsize(form), b"\0"))
    struct.pack_into(form.replace("4x", ""), changed, at + 4, *fields)
    return bytes(changed)


def _every(data, sign):
    at = data.find(sign)
    while at >= 0:
        yield at
        at = data.find(sign, at + 1)


def _kinds(form):
    """(count, letter) of a struct form without its signature: "<4x5H3I" gives (5, "H"), (3, "I")."""
    count = ""
    for letter in form.removeprefix("<4x"):
        if letter.isdigit():
            count += letter
        else:
            yield int(count or 1), letter
            count = ""


def opcodes_of(data, start=0):
    """(from, to) of every opcode of the pickle that begins at byte `start`."""
    places = [place for _, _, place in pickletools.genops(io.BytesIO(data[start:]))]
    ends = [*places[1:], places[-1] + 1]
    return [(start + place, start + end) for place, end in zip(places, ends)]


def pickle_opcode(rng, data, start=0):
    """One opcode of a pickle removed, doubled, swapped with another, replaced, or given another argument."""
    places = opcodes_of(data, start)
    (at, end), (other, other_end) = rng.choice(places[1:]), rng.choice(places[1:])
    odd = bytes([rng.choice(ODD_OPCODES)])
    argument = rng.choice(ODD_INTEGERS).to_bytes(8, "little")[: end - at - 1]
    own = data[at:end]
    piece = rng.choice((b"", own * 2, data[other:other_end], odd, odd + own, own[:1] + argument))
    return data[:at] + piece + data[end:]


def zip_pickle(rng, data):
    """A damaged pickle in an archive that is sound."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        contents = {info.filename.partition("/")[2]: opened.read(info) for info in opened.infolist()}
    changed = contents.pop("data.pkl")
    for _ in range(rng.randint(1, 3)):
        try:
            changed = rng.choice((pickle_opcode, pickle_opcode, overwrite, flip))(rng, changed)
        except (ValueError, UnicodeDecodeError, IndexError):  # what the change before left is no pickle
            break
    return zip_checkpoint(changed, {}, members=contents)


def legacy_pickle(rng, data):
    """A damaged pickle between the others, which are sound."""
    start = 0
    for _ in range(rng.randrange(LEGACY_PICKLES)):
        start = opcodes_of(data, start)[-1][1]
    return pickle_opcode(rng, data, start)


def legacy_numel(rng, data):
    """Another number of elements before one of the storages."""
    start = 0
    for _ in range(LEGACY_PICKLES):
        start = opcodes_of(data, start)[-1][1]
    value = rng.choice((*ODD_INTEGERS, len(data))) % (1 << 64)
    at = rng.choice((start, rng.randrange(start, max(len(data) - 8, start + 1))))
    return data[:at] + value.to_bytes(8, "little") + data[at + 8 :]


OF_BYTES = (flip, overwrite, truncate, remove, insert, copy_block, put_integer)
OF_ZIP = (*OF_BYTES, *(zip_field,) * 4, *(zip_pickle,) * 5)
OF_LEGACY = (*OF_BYTES, *(legacy_pickle,) * 7, *(legacy_numel,) * 2)


def mutant(fixtures, seed, index):
    """(name of the fixture, names of the mutations, bytes); `fixtures` maps names to bytes."""
    rng = random.Random(f"{seed}:{index}")
    name = rng.choice(sorted(fixtures))
    data = fixtures[name]
    first = rng.choice(OF_ZIP if data.startswith(b"PK") else OF_LEGACY)
    steps = [first, *rng.choices(OF_BYTES, k=rng.choice((0, 0, 0, 1, 2)))]
    for step in steps:
        data = step(rng, data) if data else data
    return name, [step.__name__ for step in steps], data
