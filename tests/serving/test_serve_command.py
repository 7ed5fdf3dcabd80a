"""`mlx-afm serve` as a program: what it prints, and how it ends."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from mlx_afm_cli.main import main
from mlx_afm_cli.serve_command import command
from serving_client import chat, parse_reply, request_bytes, send

CHAT = "/v1/chat/completions"


def asked(**settings):
    value = {"model": "mlx", "messages": chat("list the files"), "logit_bias": {"2": -100, "4": -100}, **settings}
    return request_bytes("POST", CHAT, json.dumps(value).encode())


@contextmanager
def serving(*arguments):
    """The program, and what it said it serves."""
    command = [sys.executable, "-m", "mlx_afm", "serve", "--port", "0", "--json", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def begun(url, tokens):
    """A connection on which an answer has begun."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(asked(stream=True, max_tokens=tokens))
    received = connection.recv(1 << 16)
    while b"data: " not in received:
        received += connection.recv(1 << 16)
    return connection, received


def rest(connection, received):
    while piece := connection.recv(1 << 16):
        received += piece
    connection.close()
    return received


def test_hidden_files_among_the_adapters_are_passed_over(model_folder, served_adapters, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(served_adapters["small"], folder / "small")
    shutil.copytree(served_adapters["small"], folder / ".trash")
    for name in ("._small", "._small.pt", ".small.pt", "._box.fmadapter"):  # as macOS leaves them on other file systems
        (folder / name).write_bytes(b"\0\5\26\7")
    (folder / "small" / "._adapters.safetensors").write_bytes(b"\0\5\26\7")
    with serving("--model", model_folder, "--adapters-dir", folder) as (_, said):
        assert said["models"] == ["mlx", "small"]


def test_the_system_prompt_of_the_command_line(model_folder):
    value = {"model": "mlx", "messages": [{"role": "user", "content": "list the files"}], "max_tokens": 1}
    counts = []
    for options in ([], ["--no-system-prompt"], ["--system-prompt", ""], ["--system-prompt", "Go."]):
        with serving("--model", model_folder, *options) as (_, said):
            reply = parse_reply(send(said["url"], request_bytes("POST", CHAT, json.dumps(value).encode())))
            counts.append(reply.json["usage"]["prompt_tokens"])
    assert counts[0] > counts[3] > counts[1] == counts[2]


def test_told_to_stop_it_finishes_what_is_under_way_and_takes_no_more(model_folder, served_adapters):
    folder = served_adapters["small"].parent
    with serving("--model", model_folder, "--adapters-dir", folder, "--adapter-memory", "5MB") as (process, said):
        assert said["models"] == ["mlx", "dora", "small", "some", "spare", "whole"]
        connection, received = begun(said["url"], 150)
        idle = socket.create_connection(connection.getpeername())
        process.send_signal(signal.SIGTERM)
        late = parse_reply(send(said["url"], asked()))
        while late.status == 200:  # the signal was slower
            late = parse_reply(send(said["url"], asked(max_tokens=1)))
        assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "stopping", "5")
        received = rest(connection, received)
        assert received.count(b'"finish_reason": null') >= 100
        assert b'"finish_reason": "length"' in received
        assert b"data: [DONE]" in received
        out, err = process.communicate(timeout=30)
        assert idle.recv(1) == b""
        idle.close()
        assert (process.returncode, out, err) == (0, "", "")


def test_a_second_signal_does_not_wait(model_folder):
    with serving("--model", model_folder) as (process, said):
        connection, received = begun(said["url"], 3900)
        process.send_signal(signal.SIGINT)
        assert parse_reply(send(said["url"], asked(max_tokens=1))).status in (200, 503)
        process.send_signal(signal.SIGINT)
        received = rest(connection, received)
        assert b'"code": "stopping"' in received
        assert b"[DONE]" not in received
        process.communicate(timeout=30)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nothing"], 1, "nothing: no such folder"),
        (["--model", "MODEL", "--host", "0.0.0.0"], 2, "--api-key"),
        (["--model", "MODEL", "--adapters-dir", "nothing"], 1, "no such folder"),
        (["--model", "MODEL", "--adapter", "a=nothing"], 2, "no such file or folder"),
        (["--model", "MODEL", "--adapter", "a b=MODEL"], 1, "cannot be a model id"),
        (["--model", "MODEL", "--adapter", "mlx=MODEL"], 1, "what the base is called"),
        (["--model", "MODEL", "--adapter-memory", "much"], 2, "not a size"),
        (["--model", "MODEL", "--allow-origin", "*"], 2, "allow_origins: expected origins such as https://app.example"),
        (["--model", "MODEL", "--rows", "0"], 2, "rows: expected at least 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_served(arguments, code, says, model_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", *[text.replace("MODEL", str(model_folder)) for text in arguments], "--port", "0"])
    told = capsys.readouterr()
    assert (stop.value.code, told.out) == (code, "")
    assert says in told.err
    assert "Traceback" not in told.err


def test_a_port_that_is_taken(model_folder, server, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", str(model_folder), "--port", server.url.rsplit(":", 1)[1]])
    assert stop.value.code == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["a", "=x", "a="])
def test_wrong_usage(adapter):
    ran = CliRunner().invoke(command, ["--model", "m", "--adapter", adapter])
    assert ran.exit_code == 2
    assert "expected NAME=PATH" in ran.output
