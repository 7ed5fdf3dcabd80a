"""Win back what quantization lost: an adapter trained on the quantized model against the unquantized one.

The result is an ordinary adapter. Kept as the quantized folder's `base_adapter` it is part of the model: feature
adapters of the same rank and scale start from it, as those of the shipped model do from its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_afm.adapters import read_adapter, write_adapter_folder
from mlx_afm.adapters.layers import ALL
from mlx_afm.checkpoints.mlx_checkpoint import BASE_ADAPTER
from mlx_afm.checkpoints.names import TARGETS
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.files import set_paths, sha256_of
from mlx_afm.folders import lock_folder
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.folder import BEST
from mlx_afm.runs.frozen import EpochData, frozen_teacher
from mlx_afm.runs.job import LoRAJob
from mlx_afm.training import Callback, Ranks, join_ranks
from mlx_afm.training.distill import distillation_from
from mlx_afm.training.hooks import ignore, notes_of
from mlx_afm.training.step import Loss, next_token_loss
from mlx_afm.workflows.lora import NEXT_TOKEN, Objective, Trained, train

LOSSES = ("distill", "next-token")


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """A recovery run.

    Attributes:
        run: model (quantized), data, adapter and how it is trained; see `LoRAJob`.
        loss: distill, the divergence from the teacher's distributions at the trained positions; or next-token.
        teacher: folder of the unquantized model, or the hub id of one; for distill alone.
        into_base: keep the adapter as the model folder's `base_adapter` when the run has ended: of distill the last
            one, since the best is told by the next token's loss; of next-token the best if there is validation data.

    Raises:
        SettingError: settings that exclude each other; all in one error.
    """

    run: LoRAJob
    loss: str = LOSSES[0]
    teacher: Path | None = None
    into_base: bool = False

    def __post_init__(self) -> None:
        set_paths(self, "teacher")
        faults, form = [], self.run.lora
        if self.loss not in LOSSES:
            faults.append(f"loss: expected {' or '.join(LOSSES)}, found {self.loss}")
        if (self.teacher is None) == (self.loss == "distill"):
            wanted = (
                "the unquantized model's folder"
                if self.loss == "distill"
                else "none: with loss next-token no teacher is used"
            )
            faults.append(f"teacher: expected {wanted}, found {self.teacher}")
        if form.fine_tune_type != "lora":
            faults.append(f"fine_tune_type: recover trains lora only, found {form.fine_tune_type}")
        if self.into_base and (set(form.targets) != set(TARGETS) or form.layers != ALL):
            faults.append("into_base: a base adapter has all projections of all layers; leave targets and layers out")
        if faults:
            raise SettingError("the settings of recover exclude each other", details=faults)


@dataclass(frozen=True)
class Recovered:
    """Outcome of a recovery run.

    Attributes:
        trained: of the run itself.
        base_adapter: where the adapter was kept as part of the model, or None.
    """

    trained: Trained
    base_adapter: Path | None


def recover(job: RecoverJob, on_event: Callback = ignore, should_stop: Callable[[], bool] = lambda: False) -> Recovered:
    """Trains the adapter; see `train` for the run's folder, resuming and several processes.

    With validation data the loss told is the next token's, whatever is trained, so that it can be compared.

    Raises:
        ConfigError: a model that is not quantized, a teacher of another vocabulary, and see `train`.

    Cost: for distill the teacher's weights and one forward pass of it besides what QLoRA takes.
    """
    if job.into_base and not job.run.model.is_dir():
        advice = "Download it, or fuse the adapter into a copy: mlx-afm fuse."
        raise ConfigError("into_base changes a folder of yours", where=job.run.model, advice=advice)
    folder = ModelFolder(job.run.model)
    run = replace(job.run, model=folder.path)
    if not folder.schemes:
        advice = "Quantize it first (mlx-afm convert -q), or train with mlx-afm lora."
        raise ConfigError("nothing to recover: the model is not quantized", where=run.model, advice=advice)
    ranks = join_ranks(run.train.rank_timeout_seconds)
    with ExitStack() as stack:
        if job.into_base and ranks.is_main_process:
            stack.enter_context(lock_folder(run.model, on_note=notes_of(on_event)))
        return _recover(replace(job, run=run), folder, ranks, on_event, should_stop)


def _recover(
    job: RecoverJob, folder: ModelFolder, ranks: Ranks, on_event: Callback, should_stop: Callable[[], bool]
) -> Recovered:
    run, kept = job.run, None
    objective = NEXT_TOKEN if job.teacher is None else _objective(folder, job.teacher)
    trained = train(run, on_event, should_stop, objective)
    if job.into_base and not trained.interrupted:
        kept = run.model / BASE_ADAPTER
        if ranks.is_main_process:
            best = trained.adapter_path / BEST
            takes_best = job.loss == "next-token" and best.is_dir()
            made = read_adapter(best if takes_best else trained.adapter_path, folder.config)
            write_adapter_folder(kept, made)
        ranks.wait()
    return Recovered(trained, kept)


def _objective(trained: ModelFolder, teacher: Path) -> Objective:
    """Distillation from a teacher, which must read the same tokens."""
    folder = ModelFolder(teacher)
    words, ours = folder.config.vocab_size, trained.config.vocab_size
    if words != ours:
        raise ConfigError("a teacher of another vocabulary", where=folder.path, expected=ours, found=words)
    files = [place.tokenizer_file for place in (folder, trained)]
    if len({sha256_of(file) for file in files if file is not None}) > 1:
        raise ConfigError("the teacher has another tokenizer", where=files[0], expected=f"that of {trained.path}")
    held = sum(tensor.nbytes for tensor in folder.tensors.values())
    sources = {"loss": "distill", "teacher": folder.fingerprint}
    return Objective(load=partial(_distillation, folder), sources=sources, held_bytes=held, teacher=folder)


def _distillation(folder: ModelFolder, epoch: EpochData, stack: ExitStack) -> tuple[Loss, Loss]:
    layers = stack.enter_context(frozen_teacher(epoch, folder))
    if layers is None:
        return distillation_from(folder.load_with(None)), next_token_loss
    return distillation_from(folder.load_model(layers=range(0)), layers), next_token_loss
