"""Zip archives made to do harm: name -> (builder, what the refusal says)."""

import struct
import zipfile

from hostile_pickles import COMMAND, calling
from mlx_afm.formats.torch_opcodes import MAX_OPCODES
from torch_builders import (
    FLAGS,
    HEADER,
    LOCAL_METHOD,
    LOCAL_SIZE,
    PACKED,
    SIZE,
    archive,
    dictionary,
    overlapping,
    put,
    rewrite_end,
    standard,
    tensor,
    whole,
    zip_checkpoint,
)

FOUR = {"0": bytes(4)}
SOUND = zip_checkpoint(whole(dictionary(w=tensor())), FOUR)
MEMBERS = [(b"x/data.pkl", whole(dictionary(w=tensor()))), (b"x/data/0", bytes(4))]
MEMBERS_TEXT = [(name.decode(), content) for name, content in MEMBERS]
SIZES = struct.Struct("<2I")


def with_member(name, content=b"abc"):
    return archive(*MEMBERS, (name, content))


def lying(size, packed=None):
    return archive(*MEMBERS, change_entry=lambda entry: SIZES.pack_into(entry, PACKED, packed or size, size))


def quine():
    """A member whose data, by its sizes, is the archive itself, with the member in it."""
    data = archive((b"x/quine", b""), *MEMBERS)
    return archive(
        (b"x/quine", data), *MEMBERS, change_entry=lambda entry: SIZES.pack_into(entry, PACKED, *[len(data) * 2] * 2)
    )


def heavy():
    """As many and long names, and as much pickle, as the limits let through."""
    names = [(b"x/" + b"%06d" % number + "\U0001d11e".encode() + b"a" * 490, b"") for number in range(7400)]
    memo = b"".join(b"}r" + struct.pack("<I", number) for number in range(MAX_OPCODES // 2))
    return archive((b"x/data.pkl", whole(memo)), *names)


def cut(data, before, more=0):
    return data[: data.index(before) + more]


ZIPS = {
    "compressed bomb of 100 MB": (
        lambda: standard([("x/data.pkl", bytes(100 << 20))], compression=zipfile.ZIP_DEFLATED),
        "member is compressed",
    ),
    "compressed by bzip2": (lambda: standard(MEMBERS_TEXT, compression=zipfile.ZIP_BZIP2), "member is compressed"),
    "compressed in the local header only": (lambda: archive(*MEMBERS, change=put(LOCAL_METHOD, "<H", 8)), "differ"),
    "declared size of 4 GB": (lambda: lying(0xFFFFFFFE), "reaches outside the file"),
    "declared size other than the packed one": (lambda: lying(5, packed=4), "member is compressed"),
    "declared size other than in the local header": (
        lambda: archive(*MEMBERS, change=put(LOCAL_SIZE, "<I", 9)),
        "differ",
    ),
    "zip64 size without its field": (
        lambda: archive(*MEMBERS, change_entry=put(SIZE, "<I", 0xFFFFFFFF)),
        "sizes are missing",
    ),
    "zip64 directory beyond the file": (
        lambda: rewrite_end(SOUND, (-50, "<Q", 1 << 63), (-6, "<I", 0xFFFFFFFF)),
        "does not end",
    ),
    "zip64 counts of 2^64": (lambda: rewrite_end(SOUND, (-74, "<Q", 2**64 - 1), (-66, "<Q", 2**64 - 1)), "differ"),
    "zip64 locator to itself": (lambda: rewrite_end(SOUND, (-34, "<Q", len(SOUND) - 42)), "not before its locator"),
    "overlapping members": (overlapping, "overlap"),
    "one local header for all members": (lambda: archive(*MEMBERS, change_entry=put(HEADER, "<I", 0)), "differ"),
    "quine: a member that is the archive": (quine, "reaches outside the file"),
    "member beyond the file": (lambda: archive(*MEMBERS, change_entry=put(HEADER, "<I", 1 << 30)), "outside its place"),
    "member in the directory": (
        lambda: archive(*MEMBERS, change_entry=put(HEADER, "<I", len(SOUND))),
        "outside its place",
    ),
    "member encrypted": (lambda: archive(*MEMBERS, change_entry=put(FLAGS, "<H", 0x0801)), "encrypted"),
    "name twice": (lambda: with_member(b"x/data/0"), "occurs twice"),
    "name to the parent folder": (lambda: with_member(b"x/../../canary"), "leads elsewhere"),
    "name with the parent as folder": (lambda: zip_checkpoint({}, {}, folder=".."), "leads elsewhere"),
    "name from the root": (lambda: with_member(b"/canary"), "leads elsewhere"),
    "name with backslashes": (lambda: with_member(b"x\\..\\..\\canary"), "leads elsewhere"),
    "name with NUL": (lambda: with_member(b"x/canary\0.txt"), "leads elsewhere"),
    "name of 60 kB": (lambda: with_member(b"x/" + b"a" * 60_000), "too long"),
    "name not UTF-8": (lambda: with_member(b"x/\xff\xfe"), "not UTF-8"),
    "20,000 members": (lambda: archive(*[(b"x/%d" % n, b"") for n in range(20_000)]), "directory too large"),
    "names and pickle as heavy as they may be": (heavy, "too many pickle opcodes"),
    "two folders": (lambda: with_member(b"y/data.pkl"), "expected 1 folder, found 2"),
    "no data.pkl": (lambda: archive((b"x/data/0", bytes(4))), "expected data.pkl"),
    "TorchScript program": (lambda: with_member(b"x/constants.pkl"), "TorchScript"),
    "storage too small": (lambda: zip_checkpoint(MEMBERS[0][1], {"0": bytes(3)}), "3 bytes instead of 4"),
    "byte order big": (lambda: zip_checkpoint(MEMBERS[0][1], FOUR, members={"byteorder": b"big"}), "found big"),
    "version 11": (lambda: zip_checkpoint(MEMBERS[0][1], FOUR, members={"version": b"11\n"}), "unknown version"),
    "pickle of protocol 4": (lambda: zip_checkpoint(b"\x80\x04}.", {}), "not a pickle of protocol 2"),
    "second pickle behind the first": (
        lambda: zip_checkpoint(whole(b"}") + whole(calling("os.system", COMMAND)), {}),
        "bytes after the end of the pickle",
    ),
    "data.pkl of 9 MB": (lambda: zip_checkpoint(bytes(9 << 20), {}), "data.pkl is too large"),
    "bytes before the archive": (lambda: SOUND[:64] + SOUND, "not before its locator"),
    "bytes behind the archive": (lambda: SOUND + b"\0", "no end record"),
    "comment that holds a second end": (
        lambda: rewrite_end(SOUND, (-2, "<H", 22)) + SOUND[-22:],
        "directory does not end",
    ),
    "cut in the first local header": (lambda: SOUND[:20], "no end record"),
    "cut in the pickle": (lambda: cut(SOUND, b"_rebuild_tensor_v2", 5), "no end record"),
    "cut in a storage": (lambda: cut(SOUND, b"x/data/0", 60), "no end record"),
    "cut in the directory": (lambda: cut(SOUND, b"PK\1\2", 30), "no end record"),
    "cut before the end record": (lambda: SOUND[:-22], "no end record"),
    "cut in the end record": (lambda: SOUND[:-1], "no end record"),
    "pickle cut in a sound archive": (lambda: zip_checkpoint(MEMBERS[0][1][:-3], FOUR), "cut short"),
    "empty file": (lambda: b"", "file is empty"),
    "other magic number": (lambda: b"\x89HDF" + SOUND[4:], "not a torch checkpoint"),
    "an end record alone": (lambda: SOUND[-22:], "not a torch checkpoint"),
}
