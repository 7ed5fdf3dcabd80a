"""`examples.train_adapter` of Apple's toolkit: its settings, its checkpoints at its places, this library's training.

    CHECKPOINT_DIR/adapter-final.pt       the last adapter, written anew at every save
    CHECKPOINT_DIR/adapter-epoch{n}.pt    the best two epochs, by evaluation loss, else by training loss
    CHECKPOINT_DIR/mlx-afm/               the run as `mlx-afm lora` has it: adapters, metrics, state

Epochs are counted from 1. The same as there: linear warm-up over epochs, then half a cosine; AdamW; every assistant
turn trained; too long examples cut at their end. Not the same: the first step's rate is not 0, a last shorter window
is weighted by its tokens, every line of the data is checked before training.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from mlx_afm.adapters import LoRAConfig
from mlx_afm.data import DataConfig, default_cache
from mlx_afm.errors import ConfigError, FormatError, SettingError
from mlx_afm.files import set_paths
from mlx_afm.folders import lock_folder
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.job import LoRAJob
from mlx_afm.training import (
    Callback,
    DataOrder,
    DataRead,
    Evaluated,
    Event,
    StepsReported,
    TrainConfig,
    TrainingInterrupted,
    TrainingResumed,
)
from mlx_afm.training.distributed import launched_size
from mlx_afm.training.hooks import notes_of
from mlx_afm.workflows.export import convert_adapter
from mlx_afm.workflows.lora import Trained, read_split, train

RUN = "mlx-afm"
FINAL = "adapter-final.pt"
KEPT_EPOCHS = 2
LONGEST = 4095


@dataclass(frozen=True, kw_only=True)
class ToolkitTraining:
    """The toolkit's settings, with its defaults.

    Attributes:
        model: MLX folder of the base model.
        train_data, eval_data: files of conversations.
        checkpoint_dir: where checkpoints go.
        checkpoint_frequency: epochs between checkpoints.
        epochs, learning_rate, batch_size, gradient_accumulation_steps, weight_decay, clip_grad_norm: as usual.
        warmup_epochs: epochs in which the rate rises.
        activation_checkpointing: less memory for more time.
        max_sequence_length: longest example, what is beyond is cut off; without it too long examples are refused.
        pack_sequences: several examples a row of that length; `batch_size` rows a batch.
        loss_update_frequency: steps between reports.
        cache: folder that keeps encoded data; None keeps nothing.

    Raises:
        ConfigError: settings that the toolkit refuses too.
    """

    model: Path
    train_data: Path
    checkpoint_dir: Path
    eval_data: Path | None = None
    checkpoint_frequency: int = 1
    epochs: int = 2
    learning_rate: float = 1e-3
    warmup_epochs: float = 1
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    activation_checkpointing: bool = False
    weight_decay: float = 1e-2
    clip_grad_norm: float = 1.0
    max_sequence_length: int | None = None
    pack_sequences: bool = False
    loss_update_frequency: int = 3
    cache: Path | None = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        set_paths(self, "model", "train_data", "checkpoint_dir", "eval_data")
        faults = []
        for name in ("checkpoint_frequency", "epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                faults.append(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < math.inf:
            faults.append(f"warmup_epochs: expected at least 0, found {self.warmup_epochs}")
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= LONGEST:
            faults.append(f"max_sequence_length: expected from 1 to {LONGEST}, found {self.max_sequence_length}")
        if self.pack_sequences and self.max_sequence_length is None:
            faults.append("pack_sequences: expected with max_sequence_length, the length of a row")
        if faults:
            raise SettingError("training settings out of range", details=faults)

    def require_data(self) -> None:
        """Checks that there are files to read, before anything is converted or loaded.

        Raises:
            FormatError: there are not.
        """
        for path in (self.train_data, self.eval_data):
            if path is not None and not path.is_file():
                raise FormatError("no such file", where=path, expected="conversations, one a line")


def train_adapter(settings: ToolkitTraining, on_event: Callback, should_stop: Callable[[], bool]) -> Trained:
    """Trains an adapter and writes the toolkit's checkpoints.

    The run is left and resumed, exactly, after each epoch that has a checkpoint.

    Raises:
        ConfigError, FormatError, DataError, TensorsError: see `mlx_afm.workflows.lora.train`.

    Cost: loading the model again for each checkpoint but the last.
    """
    settings.require_data()
    if launched_size() != 1:
        advice = "Several train with: mlx.launch -n N -- python -m mlx_afm lora ..."
        raise ConfigError("train_adapter is for one process", advice=advice)
    with lock_folder(settings.checkpoint_dir, on_note=notes_of(on_event)):
        return _train_adapter(settings, on_event, should_stop)


def _train_adapter(settings: ToolkitTraining, on_event: Callback, should_stop: Callable[[], bool]) -> Trained:
    job = _job(settings)
    ends = _epoch_ends(job)
    job = replace(job, train=replace(job.train, warmup=_warmup_steps(settings.warmup_epochs, ends)))
    checkpoints = _Checkpoints(settings.checkpoint_dir, job)
    start = 0
    for epoch, end in enumerate(ends, 1):
        if epoch % settings.checkpoint_frequency and end != ends[-1]:
            continue
        leg = _Leg(start, end, on_event, should_stop)
        sitting = replace(job, resume=start > 0, overwrite=start == 0)
        trained = train(sitting, on_event=leg.handle, should_stop=leg.should_stop)
        if trained.interrupted and not leg.reached:
            break
        checkpoints.save(epoch, leg.metric)
        start = end
    return trained


def _job(settings: ToolkitTraining) -> LoRAJob:
    run = settings.checkpoint_dir / RUN
    adapter = ModelFolder(settings.model).toolkit_config.adapter
    length = settings.max_sequence_length
    return LoRAJob(
        model=settings.model,
        cache=settings.cache,
        data=_link_data(run / "data", settings),
        adapter_path=run,
        lora=LoRAConfig() if adapter is None else LoRAConfig(rank=adapter.rank, scale=adapter.scale),
        train=TrainConfig(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_size * length if settings.pack_sequences and length else None,
            grad_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip_grad_norm=settings.clip_grad_norm,
            grad_checkpoint=settings.activation_checkpointing,
            steps_per_report=settings.loss_update_frequency,
            steps_per_eval=0,
            save_every=sys.maxsize,  # at the ends of epochs, by leaving and resuming
        ),
        data_config=DataConfig() if length is None else DataConfig(max_tokens=length, truncation="truncate-answer"),
    )


def _link_data(folder: Path, settings: ToolkitTraining) -> Path:
    """A folder in which the user's files have the names of splits."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for split, path in (("train", settings.train_data), ("valid", settings.eval_data)):
        if path is None:
            continue
        try:
            os.symlink(path.absolute(), folder / f"{split}.jsonl")
        except OSError:  # a file system without links
            shutil.copyfile(path, folder / f"{split}.jsonl")
    return folder


def _epoch_ends(job: LoRAJob) -> list[int]:
    """The number of steps done at the end of each epoch."""
    order = DataOrder(read_split(job, ModelFolder(job.model).require_tokenizer(), "train"), job.train)
    batches = [len(order.epoch(number)) for number in range(job.train.epochs)]
    return list(accumulate(math.ceil(count / job.train.grad_accumulation_steps) for count in batches))


def _warmup_steps(epochs: float, ends: list[int]) -> float:
    return float(min(round(epochs * ends[-1] / len(ends)), ends[-1]))


class _Leg:
    """From one checkpoint to the next: knows when it is there, and the loss it arrives with."""

    def __init__(self, start: int, end: int, on_event: Callback, should_stop: Callable[[], bool]) -> None:
        self.step, self.end, self.later = start, end, start > 0
        self.on_event, self.asked = on_event, should_stop
        self.reached, self.losses = False, list[float]()
        self.evaluated: float | None = None

    def should_stop(self) -> bool:
        """Asked once before each step."""
        self.reached = self.step >= self.end
        self.step += 1
        return self.reached or self.asked()

    def handle(self, event: Event) -> None:
        """Passes events on, but for those of leaving and resuming."""
        if isinstance(event, Evaluated) and event.step == self.end:
            self.evaluated = event.loss
        if isinstance(event, StepsReported):
            self.losses.append(event.loss)
        ours = isinstance(event, TrainingInterrupted) and self.reached
        if not ours and not (self.later and isinstance(event, (TrainingResumed, DataRead))):
            self.on_event(event)

    @property
    def metric(self) -> float:
        """Evaluation loss, else mean training loss, lower is better; infinite if it is not a number."""
        loss = self.evaluated if self.evaluated is not None else sum(self.losses) / max(1, len(self.losses))
        return math.inf if math.isnan(loss) else loss


class _Checkpoints:
    """Writes `adapter-final.pt`, and keeps the best epochs beside it."""

    def __init__(self, folder: Path, job: LoRAJob) -> None:
        self.folder, self.job = folder, job
        self.kept: list[tuple[float, str]] = []

    def save(self, epoch: int, metric: float) -> None:
        """Writes the run's last adapter as the final one, and as that of an epoch if it is among the best."""
        name = f"adapter-epoch{epoch}.pt"
        self.kept.append((metric, name))
        self.kept.sort(key=lambda item: item[0])
        worse = [name for _, name in self.kept[KEPT_EPOCHS:]]
        self.kept = self.kept[:KEPT_EPOCHS]
        self._write(FINAL)
        if name not in worse:
            self._write(name)
        for old in worse:
            (self.folder / old).unlink(missing_ok=True)

    def _write(self, name: str) -> None:
        with tempfile.TemporaryDirectory(prefix=".checkpoint.", dir=self.folder) as folder:
            convert_adapter(self.job.adapter_path, Path(folder) / name, model_path=self.job.model)
            os.replace(Path(folder) / name, self.folder / name)
