"""Ctrl-C and SIGTERM while training: the first stops after the current step, the second stops immediately."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .output import note

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Whether someone asked to stop; can be called, to be a `should_stop`.

    Attributes:
        signal: what they asked with.
        saves: whether there is something to save yet; before that the first signal stops immediately.
        silent: whether another process tells what happens; it saves, too.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self.saves = self.silent = silent

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended; that of SIGTERM if another process got it."""
        return CODES[self.signal or signal.SIGTERM]

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted; the second one raises, wherever the program is."""
        if self.signal is not None or not self.saves:
            if number == signal.SIGTERM:
                raise SystemExit(CODES[signal.SIGTERM])
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if not self.silent:
            note("stopping after this step, and saving; press again to stop immediately without saving")


@contextmanager
def stop_on_signals(*, silent: bool = False) -> Iterator[StopRequest]:
    """Handles SIGINT and SIGTERM while it lasts; `silent`: see `StopRequest`."""
    request = StopRequest(silent=silent)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.handle) for number in CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
