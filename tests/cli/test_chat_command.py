"""`mlx-afm chat`, from a pipe and at a terminal."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import mlx_afm
from mlx_afm.data import read_examples
from mlx_afm_cli.main import main

pty = pytest.importorskip("pty", reason="needs a Unix terminal")
FIRST, SECOND = "sort vido.conf in reverse", "how much space does test-87 take"
SYSTEM = "Answer with one shell command."


@pytest.fixture
def talk(cli, model_folder):
    """A function that pipes lines into a chat with eight tokens an answer."""

    def run(*lines, options=()):
        text = "\n".join(lines) + "\n"
        return cli("chat", "--model", model_folder, "-m", 8, *options, stdin=text.encode())

    return run


@pytest.fixture(scope="module")
def answer(model_folder):
    """A function that answers a conversation without any chat."""
    model, tokenizer = mlx_afm.load(model_folder)

    def ask(*texts, adapter=None, **settings):
        system, said = (texts[:1], texts[1:]) if texts[0] == SYSTEM else ((), texts)
        messages = [{"role": "system", "content": text} for text in system]
        messages += [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
        asked = (model, tokenizer) if adapter is None else mlx_afm.load(model_folder, adapter)
        return mlx_afm.generate(*asked, messages, max_tokens=8, **settings)

    return ask


def test_answers_are_lines_on_stdout_and_nothing_else(talk, answer):
    ran = talk(f"/system {SYSTEM}", FIRST, SECOND)
    first = answer(SYSTEM, FIRST)
    assert ran.out == f"{first}\n{answer(SYSTEM, FIRST, first, SECOND)}\n"
    assert (ran.code, ran.err) == (0, f"(system message: {SYSTEM})\n")


def test_json_is_an_object_for_each_answer(talk, answer):
    ran = talk(FIRST, "", SECOND, "/quit", "never read", options=["--json", "--system-prompt", SYSTEM])
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["text"] for one in told] == [first := answer(SYSTEM, FIRST), answer(SYSTEM, FIRST, first, SECOND)]
    assert told[0]["reused_tokens"] == 0
    assert told[1]["reused_tokens"] >= told[0]["prompt_tokens"]
    assert set(told[0]) == {"text", "prompt_tokens", "reused_tokens", "generation_tokens", "finish_reason"}


def test_verbose_counts_on_stderr(talk):
    ran = talk(FIRST, options=["--verbose", "true", "--system-prompt", SYSTEM])
    assert re.search(r"\(prompt \d+ tokens, 0 known; answer \d+\)\n", ran.err)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one\\", "two\\", "", "three"], "one\ntwo"),
        (['"""one', " two ", 'three"""'], "one\n two \nthree"),
        (['"""', "one", "/reset", '"""'], "one\n/reset"),
        (['"""one"""'], "one"),
        (["//adapter"], "/adapter"),
        (["one\\"], "one"),
        (['"""', "no end"], "no end"),
    ],
    ids=["backslash", "quotes", "command within quotes", "quotes on a line", "two strokes", "cut", "open"],
)
def test_messages_of_several_lines(talk, tmp_path, lines, message):
    path = tmp_path / "chat.jsonl"
    saves = [] if message in ("no end",) or lines == ["one\\"] else [f"/save {path}"]
    ran = talk(*lines, *saves)
    assert ran.code == 0
    if saves:
        assert json.loads(path.read_text())[0] == {"role": "user", "content": message}
    else:
        assert ran.out  # the end of the input ends the message


def test_adapters_by_name_and_by_path(talk, answer, adapter_forms):
    path, other = adapter_forms["folder"], adapter_forms["fmadapter"]
    ran = talk(
        "/adapter", FIRST, "/reset", "/adapter box", FIRST, "/reset", f"/adapter {other}", FIRST, "/reset",
        "/adapter none", FIRST, options=["--adapter", f"box={path}"],
    )  # fmt: skip
    base, adapted = answer(FIRST), answer(FIRST, adapter=path)
    assert base != adapted
    assert ran.out == f"{base}\n{adapted}\n{adapted}\n{base}\n"
    said = [line for line in ran.err.splitlines() if "adapter" in line]
    assert said == [
        "(adapter in use: none)",
        "(adapters to choose from: none, box)",
        "(adapter in use: box)",
        f"(adapter in use: {other})",
        "(adapter in use: none)",
    ]


def test_the_conversation_goes_on_with_another_adapter(talk, answer, adapter_forms):
    """Its keys and values are computed anew."""
    path = adapter_forms["folder"]
    ran = talk(FIRST, "/adapter box", SECOND, options=["--adapter", f"box={path}", "--json"])
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert told[1]["reused_tokens"] == 0
    assert told[1]["text"] == answer(FIRST, told[0]["text"], SECOND, adapter=path)


def test_adapter_path_is_the_one_to_begin_with(talk, answer, adapter_forms):
    ran = talk(FIRST, "/adapter none", "/reset", FIRST, options=["--adapter-path", adapter_forms["pt"]])
    assert ran.out == f"{answer(FIRST, adapter=adapter_forms['folder'])}\n{answer(FIRST)}\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_saved_chat_is_read_again(talk, cli, answer, model_folder, tmp_path, suffix):
    path = tmp_path / f"chat{suffix}"
    ran = talk(f"/system {SYSTEM}", FIRST, f"/save {path}", SECOND, f"/save {path}")
    assert f"(4 messages in {path})" in ran.err
    (example,) = read_examples((path,), ())
    first, second = ran.out.splitlines()
    assert [message.content for message in example.messages] == [SYSTEM, FIRST, first, SECOND, second]
    checked = cli("data", "check", "--data", path, "--model", model_folder, "--json").json
    assert checked["problems"] == []
    if suffix == ".jsonl":  # the last question is asked again, with everything before it
        again = tmp_path / "again.jsonl"
        assert cli("generate", "--model", model_folder, "-p", path, "--output", again, "-m", 8).code == 0
        assert json.loads(again.read_text())["answer"] == second


def test_what_is_refused_is_said_and_the_chat_goes_on(talk, answer, tmp_path, other_adapter):
    (tmp_path / "mine.jsonl").write_text("mine")
    refused = {
        f"/save {tmp_path}/chat.jsonl": "nothing was answered yet",
        "/nonsense": "no such command: /nonsense; /help lists the commands",
        "/adapter nobody": "nobody: no such adapter",
        f"/adapter {other_adapter}": "mlx-afm: ",
        "a<turn_end>b": "spells out the special token '<turn_end>'",
        "/save": "/save needs a file name",
    }
    ran = talk(*refused, FIRST, f"/save {tmp_path}/mine.jsonl", f"/save {tmp_path}/chat.txt")
    assert (ran.code, ran.out) == (0, f"{answer(FIRST)}\n")
    said = [*refused.values(), "there is a file or folder of this name", "jsonl or .json at its end"]
    assert [text for text in said if text not in ran.err] == []
    assert ran.err.count("mlx-afm: ") == 6
    assert "Traceback" not in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.jsonl"]
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_full_context_is_said(talk, answer):
    ran = talk(FIRST, SECOND, "/reset", "hi", options=["--context", 46])
    first, second = ran.out.splitlines()  # the question between was not answered
    assert answer(FIRST).startswith(first)
    assert answer("hi").startswith(second)
    full, refused, *_ = ran.err.splitlines()
    assert full == "(the conversation has reached the context limit; /save FILE keeps it, /reset starts a new one)"
    assert refused.startswith("mlx-afm: the conversation fills the model's context (expected at most 45 tokens")


def test_the_limit_of_an_answer_is_said(talk):
    assert talk(FIRST, options=["-m", 2]).err == "(the answer reached --max-tokens)\n"


def test_help_names_every_command(talk):
    ran = talk("/help")
    assert all(f"\n/{name} " in f"\n{ran.err}" for name in ("adapter", "system", "reset", "save", "help", "quit"))


def test_a_draft_model_changes_no_answer(talk, model_folder):
    lines = [FIRST, SECOND]
    for number in ("3", "auto"):
        ran = talk(*lines, options=["--draft-model", model_folder, "--num-draft-tokens", number])
        assert ran.out == talk(*lines).out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--adapter", "box"], 2, "expected NAME=PATH, found box"),
        (["--adapter", "box=nowhere"], 2, "no such file or folder: nowhere"),
        (["--num-draft-tokens", "0"], 2, "expected 1 to 100, or auto; found 0"),
        (["--context", "5000"], 2, "context_tokens: expected from 2 to 4096, found 5000"),
        (["--temp", "-1"], 2, "temp: expected at least 0"),
        (["--top-k", "512"], 2, "top_k is too large"),
        (["--adapter-path", "nowhere"], 1, "nowhere"),
        (["--draft-model", "nowhere"], 1, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(talk, options, code, says):
    ran = talk(FIRST, options=options)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert "Traceback" not in ran.err


def test_bytes_that_are_no_text(cli, model_folder):
    ran = cli("chat", "--model", model_folder, "-m", 8, stdin=b"\xff\n")
    assert (ran.code, ran.out) == (1, "")
    assert "stdin: not UTF-8 text" in ran.err


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, *arguments):
        self.end, inner = pty.openpty()
        command = [sys.executable, "-m", "mlx_afm", "chat", *map(str, arguments)]
        ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # as shells have programs in the background do
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=ignore
        )
        os.close(inner)
        self.shown = ""

    def wait(self, pattern, seconds=60):
        """Reads on until the pattern is there; gives what came before it and takes all of it away."""
        until = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            ready, _, _ = select.select([self.end], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.shown[-500:]!r}"
            try:
                self.shown += os.read(self.end, 1 << 16).decode(errors="replace")
            except OSError:  # Linux says so at the end
                raise AssertionError(f"it left before {pattern!r}: {self.shown[-500:]!r}") from None
        before, self.shown = self.shown[: found.start()], self.shown[found.end() :]
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt(self, asleep=True):
        """Ctrl-C; when it waits for a key, since one between the prompt and that is noticed with the next key."""
        time.sleep(0.5)
        status, sleeping = Path(f"/proc/{self.process.pid}/stat"), 0
        while asleep and status.exists() and sleeping < 10:  # on a busy machine half a second is not enough
            state = status.read_text().rpartition(")")[2].split()[0]
            sleeping = sleeping + 1 if state == "S" else 0
            time.sleep(0.02)
        self.process.send_signal(signal.SIGINT)

    def close(self):
        code = self.process.wait(30)
        os.close(self.end)
        return code


@pytest.fixture
def terminal(model_folder):
    """At this temperature and seed the model does not come to an end by itself."""
    opened = Terminal("--model", model_folder, "--temp", 50, "--seed", 1, "-m", 3000)
    yield opened
    if opened.process.poll() is None:
        opened.process.kill()
        opened.process.wait()


def test_control_c_stops_the_answer_and_twice_leaves(terminal, tmp_path):
    terminal.wait("> ")
    terminal.type("hello\n")
    terminal.wait(r"hello\r?\n[^\r\n]{20}")
    terminal.interrupt(asleep=False)
    terminal.wait(r"\(stopped\)\r?\n")
    terminal.wait("> ")
    terminal.type(f"/save {tmp_path}/cut.jsonl\n")
    terminal.wait(r"\(2 messages in")
    terminal.wait("> ")
    terminal.interrupt()
    terminal.wait("Ctrl-C again to leave")
    terminal.wait("> ")
    terminal.type("/system\n")
    terminal.wait("system message: the model")
    terminal.wait("> ")
    terminal.interrupt()
    terminal.wait("Ctrl-C again to leave")
    terminal.interrupt()
    assert terminal.close() == 0
    (_, cut) = json.loads((tmp_path / "cut.jsonl").read_text())
    assert len(cut["content"]) >= 20


def test_control_d_leaves(terminal):
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_chat_is_among_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "chat" in capsys.readouterr().out
