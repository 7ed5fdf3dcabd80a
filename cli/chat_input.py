"""What a user types: messages of one line or several, at a terminal or from a pipe."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

from mlx_afm.errors import DataError

from .output import note

QUOTES = '"""'


class Messages:
    """Reads one message after the other; prompts and Ctrl-C are for terminals."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        if self._terminal:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents have their children ignore it
            with suppress(ImportError):
                import readline  # noqa: F401  (`input` then edits lines and remembers them)

    def read(self) -> str | None:
        """The next message, without spaces around it; None at the end of the input, or after Ctrl-C twice.

        Raises:
            DataError: not UTF-8.
        """
        warned = False
        while True:
            try:
                return self._message()
            except EOFError:
                if self._terminal:
                    note("")
                return None
            except KeyboardInterrupt:
                note("")
                if warned:
                    return None
                note("Ctrl-C again to leave")
                warned = True

    def _message(self) -> str:
        line = self._line("> ")
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip()[len(QUOTES) :])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("... "))
            except EOFError:
                break
        return "\n".join(lines).strip()

    def _quoted(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self._line("... "))
            except EOFError:
                return "\n".join(lines).strip()
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip()

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt if self._terminal else "")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where="stdin") from error
