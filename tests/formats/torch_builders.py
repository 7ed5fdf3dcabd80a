"""Checkpoint files piece by piece, sound or not: for the tests of every layer below `read_torch`."""

import io
import pickle
import struct
import zipfile

from mlx_afm.formats.torch_legacy import MAGIC
from mlx_afm.formats.torch_pickle import pickle_state_dict
from mlx_afm.formats.zip_writer import Written, ZipWriter, descriptor, directory_entry, end_records, local_header

# Offsets of fields in a directory entry and in a local header.
FLAGS, METHOD, PACKED, SIZE, NAMES, DISK, HEADER = 8, 10, 20, 24, 28, 34, 42
LOCAL_FLAGS, LOCAL_METHOD, LOCAL_SIZE, LOCAL_NAMES = 6, 8, 22, 26

# Pickles.

START = b"\x80\x02"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"7X\3\0\0\0cpuK\x06tQ"
HOOKS = b"ccollections\nOrderedDict\n)R"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\1K\2K\3\x86K\3K\1\x86\x89" + HOOKS + b"tR"


def plain(value):
    """Opcodes that push a value of the standard types."""
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(kind="ShortStorage", key="0", numel=2, offset=0, shape=(2,), strides=(1,), *, legacy=False, view=None):
    """Opcodes that push a tensor; `legacy` adds the sixth element of the persistent id."""
    identity = plain("storage") + b"ctorch\n" + kind.encode() + b"\n" + plain(key) + plain("cpu") + plain(numel)
    storage = b"(" + identity + (plain(view) if legacy or view else b"") + b"tQ"
    arguments = b"(" + storage + plain(offset) + plain(shape) + plain(strides) + b"\x89" + HOOKS + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def dictionary(**entries):
    """Opcodes that push a dictionary of opcodes."""
    return b"}(" + b"".join(plain(name) + body for name, body in entries.items()) + b"u"


def whole(body):
    """A pickle of these opcodes."""
    return START + body + b"."


# Zip archives.


def archive(*members, change=None, change_entry=None, between=b""):
    """An archive of (name, content); the changes edit a member's local header and directory entry as bytearrays."""
    out, entries = b"", []
    for name, content in members:
        member = Written(name, 0, len(content), len(out))
        header = bytearray(local_header(name, len(content), len(out)))
        entry = bytearray(directory_entry(member))
        if change:
            change(header)
        if change_entry:
            change_entry(entry)
        out += bytes(header) + content + descriptor(member)
        entries.append(bytes(entry))
    start, directory = len(out), b"".join(entries)
    return out + directory + between + end_records(len(entries), start, len(directory))


def put(offset, form, value):
    return lambda record: struct.pack_into(form, record, offset, value)


def standard(members, **options):
    """An archive by the standard library."""
    handle = io.BytesIO()
    with zipfile.ZipFile(handle, "w", **options) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return handle.getvalue()


def rewrite_end(data, *changes):
    """The archive with (offset from its end, form, value) put in."""
    changed = bytearray(data)
    for offset, form, value in changes:
        struct.pack_into(form, changed, len(data) + offset, value)
    return bytes(changed)


def overlapping():
    """A member that lies inside another."""
    inner = local_header(b"x/inner", 3, 64) + b"abc" + descriptor(Written(b"x/inner", 0, 3, 64))
    outer = local_header(b"x/outer", len(inner), 0)
    assert len(outer) == 64
    start = 64 + len(inner) + 16
    entries = directory_entry(Written(b"x/outer", 0, len(inner), 0)) + directory_entry(Written(b"x/inner", 0, 3, 64))
    return outer + inner + bytes(16) + entries + end_records(2, start, len(entries))


# Checkpoints.


def zip_checkpoint(pickled, storages, *, members=(), omit=(), folder="x"):
    """A file of these descriptions (or pickle) and storages."""
    contents = {
        "data.pkl": pickled if isinstance(pickled, bytes) else pickle_state_dict(pickled),
        "byteorder": b"little",
        **{f"data/{key}": storage for key, storage in storages.items()},
        "version": b"3\n",
        **dict(members),
    }
    handle = io.BytesIO()
    writer = ZipWriter(handle)
    for name, content in contents.items():
        if name not in omit:
            writer.add(f"{folder}/{name}", len(content), [content])
    writer.finish()
    return handle.getvalue()


def checkpoint(path, pickled, storages, **options):
    """The same, written."""
    path.write_bytes(zip_checkpoint(pickled, storages, **options))
    return path


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
_DEFAULT = object()


def legacy_parts(body, storages, *, magic=MAGIC, version=1001, system=_DEFAULT, keys=_DEFAULT):
    """The five pickles, then for each (elements, bytes) of `storages`, by key, its two parts."""
    values = [magic, version, SYSTEM if system is _DEFAULT else system]
    listed = sorted(storages) if keys is _DEFAULT else keys
    pickles = [*(pickle.dumps(value, protocol=2) for value in values), whole(body), pickle.dumps(listed, protocol=2)]
    laid = [piece for _, (numel, raw) in sorted(storages.items()) for piece in (struct.pack("<q", numel), raw)]
    return pickles + laid


def legacy_checkpoint(body, storages, **options):
    return b"".join(legacy_parts(body, storages, **options))
