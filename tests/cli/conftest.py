import errno
import io
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from mlx_afm_cli.main import main


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one JSON object that stdout must be, and nothing else."""
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        value = json.loads(line)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def cli(capsys, monkeypatch):
    """A function that runs one command line in this process."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        code = stop.value.code
        return Ran(0 if code is None else code, *capsys.readouterr())

    return run


@pytest.fixture
def expect_refusal(cli, tmp_path):
    """A function that runs a command line which must fail, and gives its message.

    Failing is: exit 1, or `code`; one message on stderr (after what progress there was), nothing on stdout, and
    no file in the test's folder made, changed or removed.
    """

    def run(*arguments, says, stdin=b"", code=1):
        before = _files(tmp_path)
        ran = cli(*arguments, stdin=stdin)
        assert ran.code == code, ran.err
        assert ran.out == ""
        assert ran.err.count("mlx-afm: ") == 1
        assert "Traceback" not in ran.err
        message = ran.err.partition("mlx-afm: ")[2]
        for text in says:
            assert str(text) in message
        assert _files(tmp_path) == before
        return message

    return run


def _files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def say(cli, model_folder):
    """A function that asks a model and gives what `generate --json` prints."""

    def ask(*arguments, model=model_folder, prompt="sort vido.conf in reverse", tokens=8):
        return cli("generate", "--model", model, "--prompt", prompt, "-m", tokens, "--json", *arguments).json

    return ask


@pytest.fixture
def full_disk(monkeypatch):
    """A context manager in which the disk is full from some write to disk on (a file is synced when it is whole)."""

    @contextmanager
    def full(after=0):
        plain, calls = os.fsync, []

        def sync(descriptor):
            calls.append(descriptor)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            yield

    return full
