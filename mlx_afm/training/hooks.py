"""What a run calls while it goes: whoever watches it, saves it or stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlx_afm.training.events import Callback, Event, Notice
from mlx_afm.training.state import Snapshot


def ignore(event: Event) -> None:
    """A callback that does nothing."""


def notes_of(on_event: Callback) -> Callable[[str], None]:
    """A function that passes a sentence on as a `Notice`."""
    return lambda text: on_event(Notice(text=text))


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Callables of a run; each has a default that does nothing.

    Attributes:
        on_event: told of progress.
        save_state: called with the whole run before its first step, every `save_every` steps and at the
            end, each time before `save("last")`; after a crash the newest one is what to go on from.
        save: called with "last" and, after each evaluation lower than all before, with "best".
        should_stop: asked after each step; True saves and ends the run.
        sample: gives (prompt, answer) pairs of the model as it is; called after each evaluation.
    """

    on_event: Callback = ignore
    save_state: Callable[[Snapshot], None] = lambda snapshot: None
    save: Callable[[str], None] = lambda kind: None
    should_stop: Callable[[], bool] = lambda: False
    sample: Callable[[], Iterable[tuple[str, str]]] | None = None
