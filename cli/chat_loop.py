"""The loop of `mlx-afm chat`: messages to answers, and commands."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import click

from mlx_afm.errors import AFMError
from mlx_afm.files import to_path
from mlx_afm.generation.chat import Chat, ChatTurn
from mlx_afm.text.system_prompt import parse_system_prompt
from mlx_afm.text.template import DEFAULT_SYSTEM
from mlx_afm.workflows.chat import ChatModel, save_chat

from .chat_input import Messages
from .output import describe_os_error, note, show

HELP = """\
/adapter [NAME]   answer with another adapter: one named by --adapter, or a path; none for the model's own
/system [TEXT]    show or change the system prompt; none for no system turn, default for the one of the start
/reset            begin a new conversation
/save FILE        write the conversation to a .jsonl or .json, as training data has it
/help             this
/quit             leave; so do Ctrl-D, and Ctrl-C twice
//text            send the message /text
A backslash at the end of a line goes on in the next; lines between two \"\"\" are one message."""
ENDINGS = {
    "length": "the answer reached --max-tokens",
    "context": "the conversation has reached the context limit; /save FILE keeps it, /reset starts a new one",
    "stopped": "stopped",
}
NONE, DEFAULT = "none", "default"


class ChatLoop:
    """Reads messages until there are no more.

    Args:
        source: the model and its adapters.
        chat: the conversation.
        as_json: an object per answer on stdout, rather than its text as it comes.
        verbose: counts on stderr after each answer.
    """

    def __init__(self, source: ChatModel, chat: Chat, *, as_json: bool, verbose: bool) -> None:
        self._source, self._chat = source, chat
        self._as_json, self._verbose = as_json, verbose
        self._first_system = chat.system
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Answers and obeys."""
        self._tell_prompts()
        messages = Messages()
        while (text := messages.read()) is not None and text != "/quit":
            try:
                if text.startswith("/") and not text.startswith("//"):
                    with _interruptions():  # a change of adapters is not left half done
                        self._obey(*text.split(maxsplit=1))
                elif text:
                    self._answer(text.removeprefix("/"))
            except AFMError as error:
                note(f"mlx-afm: {error}")
            except OSError as error:
                note(f"mlx-afm: {describe_os_error(error)}")

    def _answer(self, text: str) -> None:
        pieces: list[str] = []
        try:
            with _interruptions() as stopped, closing(self._chat.ask(text, stopped)) as responses:
                for response in responses:
                    pieces.append(response.text)
                    if not self._as_json:
                        click.echo(response.text, nl=False)
        except KeyboardInterrupt:  # the second one: wherever it is
            pass
        if pieces and not self._as_json:
            click.echo()
        turn = self._chat.last
        if turn is not None and (pieces or turn.finish_reason == "stopped"):
            self._report("".join(pieces), turn)

    def _report(self, text: str, turn: ChatTurn) -> None:
        counts = {
            "prompt_tokens": turn.prompt_tokens,
            "reused_tokens": turn.reused_tokens,
            "generation_tokens": turn.generation_tokens,
            "finish_reason": turn.finish_reason,
        }
        if self._as_json:
            show({"text": text, **counts}, self._as_json)
        if turn.finish_reason in ENDINGS:
            forgotten = "" if turn.kept else "; there is no answer, so your message is removed from the conversation"
            note(f"({ENDINGS[turn.finish_reason]}{forgotten})")
        if turn.cleaned:
            note("(the answer contained special tokens as text; they are removed from the conversation)")
        if self._verbose:
            note(f"(prompt {turn.prompt_tokens} tokens, {turn.reused_tokens} known; answer {turn.generation_tokens})")

    def _obey(self, command: str, rest: str = "") -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda rest: note(HELP),
        }
        if command not in commands:
            note(f"no such command: {command}; /help lists the commands")
            return
        commands[command](rest)

    def _adapter(self, name: str) -> None:
        if name:
            self._chat.model = self._source.use(None if name == NONE else name)
            self._chat.forget()
            self._tell_prompts()
        note(f"(adapter in use: {self._source.active or NONE})")
        if not name:
            note(f"(adapters to choose from: {', '.join([NONE, *self._source.adapters])})")

    def _tell_prompts(self) -> None:
        """Warns of an adapter with several system prompts, unless the user chose one."""
        if self._chat.system is None and self._source.notice is not None:
            note(self._source.notice)

    def _system(self, text: str) -> None:
        if text:
            given = {NONE: "", DEFAULT: self._first_system}.get(text, text)
            if given:
                parse_system_prompt(given)
            self._chat.system = given
        own, now = self._chat.tokenizer.system_prompt == DEFAULT_SYSTEM, self._chat.system_prompt
        shown = "the model’s own" if self._chat.system is None and own else "none" if now is None else now
        note(f"(system message: {shown})")

    def _reset(self, rest: str) -> None:
        self._chat.messages.clear()
        note("(a new conversation)")

    def _save(self, name: str) -> None:
        if not name:
            note("/save needs a file name that ends in .jsonl or .json")
            return
        path = to_path(name)
        save_chat(path, self._chat.conversation, overwrite=path.absolute() in self._saved)
        self._saved.add(path.absolute())
        note(f"({len(self._chat.messages)} messages in {path})")


class _Stop:
    """Whether Ctrl-C was pressed; the second time it is an exception."""

    pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextmanager
def _interruptions() -> Iterator[_Stop]:
    """Ctrl-C stops an answer while this lasts."""
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
