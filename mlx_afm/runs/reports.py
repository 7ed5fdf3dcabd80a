"""Training reports to wandb, swanlab and TensorBoard; each library is imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlx_afm.errors import MissingDependencyError, SettingError
from mlx_afm.training import Callback, Evaluated, Event, StepsReported, TrainingFinished, to_record

Log = Callable[[dict[str, float], int], None]  # values by name, step


class LogReporter:
    """A callback that hands numbers to a `log` function: `train/loss`, `valid/loss` and so on."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __call__(self, event: Event, /) -> None:
        """Logs a report, an evaluation, or the end."""
        group = {StepsReported: "train", Evaluated: "valid", TrainingFinished: "run"}.get(type(event))
        if group is None:
            return
        values = {name: value for name, value in to_record(event).items() if isinstance(value, (int, float))}
        step = int(values.pop("step"))
        self.log({f"{group}/{name}": float(value) for name, value in values.items()}, step)


@contextmanager
def _wandb(project: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    wandb = _import_wandb()
    run = wandb.init(project=project, dir=str(folder), name=folder.name, config=dict(settings), resume="allow")
    try:
        yield lambda values, step: run.log(values, step=step)
    finally:
        run.finish()


@contextmanager
def _swanlab(project: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    swanlab = _import_swanlab()
    logs = str(folder / "swanlog")
    run = swanlab.init(project=project, experiment_name=folder.name, logdir=logs, config=dict(settings))
    try:
        yield lambda values, step: run.log(values, step=step)
    finally:
        run.finish()


@contextmanager
def _tensorboard(project: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    writer = _import_tensorboard().SummaryWriter(str(folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


def _import_wandb() -> Any:
    import wandb

    return wandb


def _import_swanlab() -> Any:
    import swanlab

    return swanlab


def _import_tensorboard() -> Any:
    import tensorboardX

    return tensorboardX


# Name of a report -> how to import it, what to install, how to open it.
REPORTS: Mapping[str, tuple[Callable[[], Any], str, Any]] = {
    "wandb": (_import_wandb, "wandb", _wandb),
    "swanlab": (_import_swanlab, "swanlab", _swanlab),
    "tensorboard": (_import_tensorboard, "tensorboardX", _tensorboard),
}


def require_reports(names: Sequence[str]) -> None:
    """Checks that the libraries are there, before an hour is spent.

    Raises:
        ConfigError: an unknown name. MissingDependencyError: a library that is not installed.
    """
    unknown = [name for name in names if name not in REPORTS]
    if unknown:
        raise SettingError("unknown report", expected=f"some of {', '.join(REPORTS)}", found=", ".join(unknown))
    for name in names:
        load, package, _ = REPORTS[name]
        try:
            load()
        except ImportError as error:
            advice = f"Install it: pip install {package}"
            raise MissingDependencyError(f"--report-to {name} needs {package}", advice=advice) from error


@contextmanager
def open_reports(
    names: Sequence[str], project: str, folder: Path, settings: Mapping[str, Any]
) -> Iterator[list[Callback]]:
    """Callbacks for the named reports; they are closed at the end.

    Args:
        names: some of wandb, swanlab, tensorboard.
        project: their project.
        folder: of the run; its name is the run's, and what they keep on disk goes there.
        settings: told once.
    """
    with ExitStack() as stack:
        yield [LogReporter(stack.enter_context(REPORTS[name][2](project, folder, settings))) for name in names]
