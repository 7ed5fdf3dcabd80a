"""Ctrl-C and SIGTERM while training: a polite request first, and an order the second time."""

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
        saves: whether there is something to save yet; before that the first signal is an order too.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.saves = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended; 0 without one."""
        return CODES[self.signal] if self.signal is not None else 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted; the second one raises, wherever the program is."""
        if self.signal is not None or not self.saves:
            if number == signal.SIGTERM:
                raise SystemExit(CODES[signal.SIGTERM])
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        note("finishing the step and saving; once more to stop at once")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handles SIGINT and SIGTERM while it lasts."""
    request = StopRequest()
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.handle) for number in CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
