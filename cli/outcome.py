"""What a training run leaves: its last adapter, its best one, and how to use either."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import note

if TYPE_CHECKING:
    from mlx_afm.workflows.lora import Trained


def outcome_of(trained: Trained) -> dict[str, Any]:
    """Steps, and path and loss of both adapters, as JSON."""
    return {
        "steps": trained.steps,
        "last_valid_loss": trained.last_loss,
        "best_valid_loss": trained.best_loss,
        "best_step": None if trained.best_path is None else trained.best_step,
        "best_adapter_path": None if trained.best_path is None else str(trained.best_path),
    }


def note_best(trained: Trained, model: Path) -> None:
    """Says which adapter is the best one and shows the command that uses it."""
    if trained.best_path is None:
        return
    if trained.best_step == trained.steps:
        note("the last adapter is the best one")
        return
    last = "not measured" if trained.last_loss is None else f"{trained.last_loss:.4f}"
    note(
        f"validation loss of the last adapter {last} (step {trained.steps}, {trained.adapter_path}), "
        f"of the best {trained.best_loss:.4f} (step {trained.best_step}, {trained.best_path})"
    )
    line = ["mlx-afm", "fuse", "--model", str(model), "--adapter-path", str(trained.adapter_path), "--best"]
    note(f"to use the best: {shlex.join(line)}; lora --test and export take --best too")


def chosen_adapter(path: Path | None, best: bool) -> Path | None:
    """The adapter that `--adapter-path` and `--best` name.

    Raises:
        UsageError: --best without --adapter-path. ConfigError: a run without a best adapter.
    """
    if not best:
        return path
    if path is None:
        raise click.UsageError("--best needs --adapter-path, the folder of a run")
    from mlx_afm.runs.folder import best_adapter

    return best_adapter(path)
