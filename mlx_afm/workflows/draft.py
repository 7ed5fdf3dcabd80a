"""Train a draft model against the target that will serve, and measure how much of what it proposes is accepted.

The folder of a run has what a run of `mlx-afm lora` has, and

    model                  the trained draft, an MLX folder
    draft-model-final.pt   the same as a checkpoint of the toolkit, beside its JSON
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.mlx_checkpoint import to_state_dict, write_config, write_torch_checkpoint
from mlx_afm.data import make_batch
from mlx_afm.data.sources import require_splits
from mlx_afm.draft.acceptance import LENGTHS, AcceptanceReport, break_even, measure_acceptance
from mlx_afm.draft.losses import LOSSES, MEAN_OF_EXAMPLES, draft_loss, rejection_of, same_share
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.files import atomic_folder, remove, require_space, set_paths, to_path
from mlx_afm.formats.mlx_folder import write_shards
from mlx_afm.generation.draft_rows import plain_step_seconds
from mlx_afm.generation.forms import decoder_of
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.folder import BEST
from mlx_afm.runs.frozen import EpochData, frozen_teacher
from mlx_afm.runs.job import LoRAJob
from mlx_afm.runs.lineage import adapter_fingerprint
from mlx_afm.training import Callback, StageProgress, join_ranks
from mlx_afm.training.distill import hidden_states_of
from mlx_afm.training.hooks import ignore
from mlx_afm.training.step import Loss
from mlx_afm.workflows.fuse import fuse
from mlx_afm.workflows.load import load
from mlx_afm.workflows.lora import Objective, Trained, read_split, train

MODEL = "model"  # of the run's folder: the trained draft
FINAL = "draft-model-final"  # stem of its checkpoint
WHOLE = LoRAConfig(fine_tune_type="full")
COST_TURNS, PROMPT_TOKENS = 5, 8  # of the times of both models, and known tokens


@dataclass(frozen=True, kw_only=True)
class DraftJob:
    """A run that trains a draft model.

    Attributes:
        run: data, output folder and how it is trained, see `LoRAJob`; its `model` is the draft's folder.
        target: folder of the model that will serve with it, dense or quantized, or the hub id of one.
        target_adapter: an adapter of any form on the target, in place of its own.
        loss: one of `mlx_afm.draft.losses.LOSSES`.

    Raises:
        SettingError: no such loss, or a form of adapter: a draft is trained whole.
    """

    run: LoRAJob
    target: Path
    target_adapter: Path | None = None
    loss: str = "forward-kl"

    def __post_init__(self) -> None:
        set_paths(self, "target", "target_adapter")
        if self.loss not in LOSSES:
            raise SettingError("loss", expected=", ".join(LOSSES), found=self.loss)
        if self.run.lora != WHOLE:
            raise SettingError("lora: a draft model is trained whole", expected=WHOLE, found=self.run.lora)


@dataclass(frozen=True, kw_only=True)
class DraftReport:
    """Acceptance of a pair on held-out data, and what it gives on this machine.

    Attributes:
        acceptance: see there.
        cost_ratio: the draft's time of a token in passes of the target.
        speed_ups: predicted for 1 to 8 proposals, greedy.
        break_even: of each, the acceptance at which it begins to pay.
        best_length: the number of proposals with the largest; 0 if none pays.
    """

    acceptance: AcceptanceReport
    cost_ratio: float
    speed_ups: tuple[float, ...]
    break_even: tuple[float, ...]
    best_length: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.acceptance.to_dict(),
            "cost_ratio": self.cost_ratio,
            "predicted_speed_up": dict(zip(map(str, LENGTHS), self.speed_ups)),
            "break_even": dict(zip(map(str, LENGTHS), self.break_even)),
            "best_length": self.best_length,
        }


@dataclass(frozen=True, kw_only=True)
class DraftTrained:
    """Outcome of a run.

    Attributes:
        trained: of the run itself.
        folder: the trained draft's MLX folder; None if the run was interrupted.
        before, after: of the draft on held-out data (the valid split, else the training data).
    """

    trained: Trained
    folder: Path | None = None
    before: DraftReport | None = None
    after: DraftReport | None = None


def train_draft(
    job: DraftJob, on_event: Callback = ignore, should_stop: Callable[[], bool] = lambda: False
) -> DraftTrained:
    """Trains a draft model; see `workflows.lora.train` for the run's folder, resuming and several processes.

    Evaluations tell 1 - alpha, the share of proposals that would be refused at temperature 1, and the best draft is the
    one with the least.

    Raises:
        ConfigError: a draft of another vocabulary, or a quantized one, and see `train`.

    Cost: the target's weights in the first epoch, and its final hidden states at trained positions on disk.
    """
    folder, target = ModelFolder(job.run.model), ModelFolder(job.target)
    require_fitting(folder, target)
    if job.target_adapter is not None:
        target.open_adapter(job.target_adapter)  # before anything else is read
    run = replace(job.run, model=folder.path)
    objective = Objective(
        load=partial(_losses, job, target),
        sources=_sources(job, target),
        held_bytes=sum(tensor.nbytes for tensor in target.tensors.values()),
        teacher=target,
        batch_of=(lambda rows: make_batch(same_share(rows))) if job.loss in MEAN_OF_EXAMPLES else make_batch,
    )
    trained = train(run, on_event, should_stop, objective)
    ranks = join_ranks(run.train.rank_timeout_seconds)
    if trained.interrupted or not ranks.is_main_process:
        return DraftTrained(trained=trained)
    place = trained.adapter_path / MODEL
    remove(place)
    best = trained.adapter_path / BEST
    fuse(folder.path, best if best.is_dir() else trained.adapter_path, place)
    write_checkpoint(place, trained.adapter_path)
    measured = partial(measure_pair, job.target, job.target_adapter, run, on_event=on_event)
    return DraftTrained(trained=trained, folder=place, before=measured(folder.path), after=measured(place))


def write_checkpoint(draft: Path, target: Path) -> Path:
    """Writes a draft's folder as `draft-model-final.pt` with its JSON into another folder, and gives its path.

    Raises:
        TensorsError: NaN or infinite weights. DiskFullError: not enough space.
    """
    folder = ModelFolder(draft)
    config = folder.toolkit_config
    state = to_state_dict(config, folder.tensors, folder.observers, None, where=draft)
    require_space(target, sum(tensor.nbytes for tensor in state.values()))
    write_torch_checkpoint(draft, target, config, state, lambda count: None, FINAL)
    return target / f"{FINAL}.pt"


def require_fitting(draft: ModelFolder, target: ModelFolder) -> None:
    """Checks that a folder can be trained as a target's draft.

    Raises:
        ConfigError: another vocabulary or tokenizer, or quantized weights.
    """
    words, ours = target.config.vocab_size, draft.config.vocab_size
    if words != ours:
        raise ConfigError("a draft model of another vocabulary", where=draft.path, expected=words, found=ours)
    if draft.schemes:
        advice = "Train a dense draft model, and quantize it afterwards."
        raise ConfigError("a quantized draft model cannot be trained whole", where=draft.path, advice=advice)
    own, theirs = draft.tokenizer, target.require_tokenizer()
    if own is not None and own.sha256 != theirs.sha256:
        raise ConfigError("the draft model has another tokenizer", where=draft.path, expected=f"that of {target.path}")


def new_draft(
    folder: str | Path, target: str | Path, *, layers: int = 12, width: int = 256, heads: int = 2, seed: int = 0
) -> Path:
    """Writes a draft model with random weights, of the form of Apple's own, for a target; gives its folder.

    Args:
        folder: to write; it must not exist yet, or be empty.
        target: whose vocabulary and tokenizer it gets.
        layers, width, heads: of the draft.
        seed: of the weights.

    Raises:
        ConfigError: sizes that do not fit each other, or a folder in the way.
    """
    base, place = ModelFolder(target), to_path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError("something is there already", where=place, expected="a new or empty folder")
    config = AFMConfig(
        vocab_size=base.config.vocab_size,
        hidden_dim=width,
        num_layers=layers,
        num_kv_reuse_layers=0,
        num_heads=heads,
        num_kv_heads=1,
        kv_quant=False,
        hidden_dim_scale_factor=base.config.hidden_dim_scale_factor,
        rope_theta=base.config.rope_theta,
        rms_norm_eps=base.config.rms_norm_eps,
    )
    mx.random.seed(seed)
    model = Model(config)
    with atomic_folder(place) as partial_folder:
        write_shards(partial_folder, {name: from_mlx(array) for name, array in tree_flatten(model.parameters())})
        write_config(partial_folder, config, {"torch_dtype": "float32"})
        if base.tokenizer_file is not None:
            (partial_folder / base.tokenizer_file.name).write_bytes(base.tokenizer_file.read_bytes())
    return place


def measure_pair(
    target: str | Path,
    target_adapter: str | Path | None,
    run: LoRAJob,
    draft: str | Path,
    *,
    on_event: Callback = ignore,
) -> DraftReport:
    """Acceptance of a pair on the valid split of a run's data, else on its training data; and what it gives here.

    Raises:
        ConfigError: models that do not fit each other. DataError: no data.
    """
    model, tokenizer = load(target, target_adapter)
    if tokenizer is None:
        raise ConfigError("the model folder has no tokenizer", where=target)
    small = load(draft)[0]
    split = "valid" if "valid" in require_splits(run.data) else "train"
    data = read_split(run, tokenizer, split)

    def tell(done: int, total: int) -> None:
        on_event(StageProgress(stage="measuring acceptance", done=done, total=total, unit="batches"))

    found = measure_acceptance(small, hidden_states_of(model), model.logits, data, on_batches=tell)
    cost = cost_ratio(model, small)
    return DraftReport(
        acceptance=found,
        cost_ratio=cost,
        speed_ups=found.speed_ups(cost),
        break_even=tuple(break_even(length, cost) for length in LENGTHS),
        best_length=found.best_length(cost),
    )


def cost_ratio(target: Model, draft: Model) -> float:
    """The draft's time of a token in passes of the target on this machine: medians of plain steps in turns."""
    steps = [_plain_step(model) for model in (target, draft)]
    times = [[step() for step in steps] for _ in range(COST_TURNS)]
    first, second = (median(each) for each in zip(*times))
    return float(second / first)


def _plain_step(model: Model) -> Callable[[], float]:
    """Times plain steps of one row behind a short prompt."""
    held, prompt = decoder_of(model), model.make_cache()
    held.decoder.prefill(mx.zeros((1, PROMPT_TOKENS), mx.int32), prompt, held.route)
    cache = held.decoder.new_cache()
    cache.append(prompt, PROMPT_TOKENS)
    return partial(plain_step_seconds, held.decoder, cache, held.route, steps_done=held.decoder.plain_steps)


def _sources(job: DraftJob, target: ModelFolder) -> dict[str, str]:
    sources = {"loss": job.loss, "teacher": target.fingerprint}
    if job.target_adapter is not None:
        sources["adapter of the teacher"] = adapter_fingerprint(job.target_adapter)
    return sources


def _losses(job: DraftJob, target: ModelFolder, epoch: EpochData, stack: ExitStack) -> tuple[Loss, Loss]:
    path = job.target_adapter
    adapter = None if path is None else target.open_adapter(path)

    def teacher() -> Model:
        return target.load_with(adapter, where=path)

    known = None if path is None else adapter_fingerprint(path)
    layers = stack.enter_context(frozen_teacher(epoch, target, teacher, adapter=known, evaluates=True))
    changes_head = adapter is not None and adapter.config.fine_tune_type in WHOLE_WEIGHTS
    model = teacher() if layers is None or changes_head else target.load_model(layers=range(0))
    wanted = hidden_states_of(model, layers)
    return draft_loss(job.loss, wanted, model.logits), rejection_of(wanted, model.logits)
