"""Whole checkpoint files made to do harm, zip and legacy: each is refused, and nothing else happens.

They are read in a process of its own under the guard of `guarded_reader`. `docs/hostile-files.md` lists them; running
this file writes the list anew.
"""

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from hostile_pickles import COMMAND, EXECUTIONS, PICKLES, SHARED, TENSORS, calling
from hostile_zips import FOUR, ZIPS
from torch_builders import (
    HOOKS,
    SYSTEM,
    dictionary,
    legacy_checkpoint,
    legacy_parts,
    tensor,
    whole,
    zip_checkpoint,
)

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "hostile-files.md"
LIST_TITLE = "## Named hostile files"
MAX_SECONDS = 20


def zipped(body):
    return zip_checkpoint(whole(body), FOUR)


def legacy(body=None, storages=None, **options):
    body = dictionary(w=tensor(legacy=True)) if body is None else body
    return legacy_checkpoint(body, {"0": (2, bytes(4))} if storages is None else storages, **options)


def cut_legacy(parts):
    """The last byte of so many parts is missing."""
    return b"".join(legacy_parts(dictionary(w=tensor(legacy=True)), {"0": (2, bytes(4))})[:parts])[:-1]


LEGACY = {
    "magic number of another": (lambda: legacy(magic=1), "not a torch checkpoint .*magic number"),
    "magic number as code": (lambda: whole(calling("os.system", COMMAND)) + legacy()[15:], "os.system"),
    "bare pickle of protocol 4": (lambda: b"\x80\x04" + legacy()[2:], "not a pickle of protocol 2"),
    "protocol version 1002": (lambda: legacy(version=1002), "unknown version .*found 1002"),
    "protocol version as a list": (lambda: legacy(version=[1001]), "unknown version .*found list"),
    "big-endian": (lambda: legacy(system={**SYSTEM, "little_endian": False}), "byte order"),
    "byte order not said": (lambda: legacy(system={"protocol_version": 1001}), "byte order"),
    "system information as a list": (lambda: legacy(system=[1]), "unknown system information"),
    "system information of 9 kB": (lambda: legacy(system={"a": "b" * 4000, "c": "d" * 4000}), "pickle too large"),
    "key twice": (lambda: legacy(keys=["0", "0"]), "key occurs twice"),
    "key that no tensor names": (lambda: legacy(keys=["0", "1"]), "keys and tensors differ .*such as '1'"),
    "key missing": (lambda: legacy(keys=[]), "keys and tensors differ .*such as '0'"),
    "keys as a dictionary": (lambda: legacy(keys={"0": 0}), "not a list of storage keys"),
    "keys as numbers": (lambda: legacy(keys=[0]), "not a list of storage keys"),
    "half a million keys": (lambda: legacy(keys=[str(n) for n in range(500_000)]), "too many pickle opcodes"),
    "keys as code": (
        lambda: b"".join([*legacy_parts(HOOKS, {})[:4], whole(calling("posix.system", COMMAND))]),
        "posix.system",
    ),
    "numel smaller than its tensors say": (lambda: legacy(storages={"0": (1, bytes(2))}), "another size .*found 1"),
    "numel larger than its tensors say": (lambda: legacy(storages={"0": (1 << 62, bytes(4))}), "another size"),
    "numel negative, here and there": (
        lambda: legacy(dictionary(w=tensor(numel=-1, legacy=True)), {"0": (-1, b"")}),
        "another size .*found -1",
    ),
    "numel huge, here and there": (
        lambda: legacy(dictionary(w=tensor(numel=1 << 62, legacy=True)), {"0": (1 << 62, bytes(4))}),
        "reaches outside the file",
    ),
    "storage beside the tensors, huge": (
        lambda: legacy(
            dictionary(model=dictionary(w=tensor(legacy=True)), extra=tensor(key="1", numel=1 << 50, legacy=True)),
            {"0": (2, bytes(4)), "1": (1 << 50, b"")},
        ),
        "reaches outside the file",
    ),
    "storage of a quantized dtype": (
        lambda: legacy(dictionary(w=tensor("QInt8Storage", legacy=True))),
        "dtype qint8 are not supported",
    ),
    "storage that is a view of another": (
        lambda: legacy(dictionary(w=tensor(view=("1", 0, 2)))),
        "not one of torch's storages",
    ),
    "bytes behind the last storage": (lambda: legacy() + b"\0", "bytes after the last storage .*found 1 bytes"),
    "a second checkpoint behind the first": (lambda: legacy() + legacy(), "bytes after the last storage"),
    "tar archive of torch 0.1": (lambda: b"storages".ljust(512, b"\0") * 4, "not a torch checkpoint"),
    "cut in the magic number": (lambda: cut_legacy(1), "cut short"),
    "cut in the version": (lambda: cut_legacy(2), "cut short"),
    "cut in the system information": (lambda: cut_legacy(3), "cut short"),
    "cut in the saved object": (lambda: cut_legacy(4), "cut short"),
    "cut in the keys": (lambda: cut_legacy(5), "cut short"),
    "cut in the size of a storage": (lambda: cut_legacy(6), "cut short before a storage"),
    "cut in a storage": (lambda: cut_legacy(7), "reaches outside the file"),
    "cut behind the keys": (lambda: legacy()[:-12], "cut short before a storage"),
}


def hostile_files():
    """Name -> (builder, what the refusal says)."""
    table = {}
    for name, (body, says) in (EXECUTIONS | PICKLES).items():
        table[f"zip: {name}"] = (lambda body=body: zipped(body)), says
        table[f"legacy: {name}"] = (lambda body=body: legacy(body, None if b"Storage" in body else {})), says
    for name, (changes, says) in TENSORS.items():
        table[f"zip: tensor, {name}"] = (lambda changes=changes: zipped(dictionary(w=tensor(**changes)))), says
    for name, changes in SHARED.items():
        body = dictionary(a=tensor(), b=tensor(**changes))
        table[f"zip: {name}"] = (lambda body=body: zipped(body)), "two types or sizes"
        table[f"legacy: {name}"] = (lambda body=body: legacy(body)), "two types or sizes"
    for form, files in (("zip", ZIPS), ("legacy", LEGACY)):
        table |= {f"{form}: {name}": entry for name, entry in files.items()}
    return table


HOSTILE = hostile_files()


def listing():
    """The part of the page that lists the files."""
    rows = [f"- {name}: `{says}`" for name, (_, says) in HOSTILE.items()]
    return "\n".join([LIST_TITLE, "", f"{len(HOSTILE)} files, each with what its refusal says.", "", *rows, ""])


def snapshot(folder):
    """Every path below the folder with what it holds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What reading each of them came to, in one guarded process that starts in a folder beside theirs."""
    top = tmp_path_factory.mktemp("hostile")
    (top / "files").mkdir()
    (top / "here").mkdir()
    names = {}
    for number, (name, (build, _)) in enumerate(HOSTILE.items()):
        names[f"{number:03}.pt"] = name
        (top / "files" / f"{number:03}.pt").write_bytes(build())
    before = snapshot(top)
    command = [sys.executable, HERE / "guarded_reader.py", top / "files", HERE / "fixtures" / "tied.pt"]
    ran = subprocess.run(command, cwd=top / "here", capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert snapshot(top) == before, "a file was made, changed or removed"
    return {names[file]: outcome for file, outcome in json.loads(ran.stdout).items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_else_happens(name, outcomes):
    outcome = outcomes[name]
    assert outcome["outcome"] == "refused", outcome
    assert re.search(HOSTILE[name][1], outcome["message"], re.DOTALL), outcome["message"]
    assert len(outcome["message"]) < 2000
    assert outcome["noted"] == []
    assert outcome["seconds"] < MAX_SECONDS


def test_there_are_many_of_each_form():
    forms = [name.partition(":")[0] for name in HOSTILE]
    assert forms.count("zip") >= 40
    assert forms.count("legacy") >= 40


def test_the_page_lists_them():
    assert PAGE.read_text(encoding="utf-8").endswith(listing())


def test_the_guard_notices(tmp_path):
    """What the other tests rely on: code run, files opened and memory taken do show."""
    harm = tmp_path / "harm.py"
    harm.write_text(
        "import sys, os, guarded_reader as g\n"
        "from pathlib import Path\n"
        "example = Path(sys.argv[1]); g.start_guard(example); found = []\n"
        "for act in (lambda: os.system('true'), lambda: eval('1'), lambda: open('x', 'w'), lambda: bytes(80 << 20)):\n"
        "    g.read_torch_checkpoint = lambda path: act()\n"
        "    found.append(g.guarded_read(example)[:3])\n"
        "print([(noted or told.partition(':')[0]) for _, told, noted in found])\n"
    )
    command = [sys.executable, "harm.py", HERE / "fixtures" / "tied.pt"]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("[['os.system'"), ran.stdout
    assert "'compile'" in ran.stdout
    assert "'open x'" in ran.stdout
    assert "'MemoryError'" in ran.stdout or not sys.platform.startswith("linux")


if __name__ == "__main__":
    kept = PAGE.read_text(encoding="utf-8").partition(LIST_TITLE)[0]
    PAGE.write_text(kept + listing(), encoding="utf-8")
