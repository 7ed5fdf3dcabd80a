"""Which layers of a run are computed once for each example, where that is kept, and why not if not."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mlx.core as mx

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.adapters.layers import ALL, chosen_layers
from mlx_afm.checkpoints.mlx_checkpoint import NORM
from mlx_afm.data import TokenTable
from mlx_afm.data.read import KEPT_DAYS
from mlx_afm.files import format_bytes, free_bytes, parse_bytes
from mlx_afm.memory import DTYPE_BYTES
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.activation_store import STORES, DiskStore, remove_unused_stores
from mlx_afm.runs.job import AUTO, OFF, RECOMPUTE, LoRAJob
from mlx_afm.runs.lineage import START_SOURCE
from mlx_afm.runs.start import start_adapter, takes_base_adapter
from mlx_afm.runs.state import SavedRun
from mlx_afm.training import Callback, Notice, Ranks
from mlx_afm.training.frozen import FrozenLayers
from mlx_afm.training.hooks import notes_of

FORMAT = 1  # of what a store holds; counted up when the arithmetic of the layers changes
DISK_SHARE = 0.5  # of the free disk that a store may fill
BACKWARD = 2.0  # forward passes that the backward pass of a layer costs
STUDENT, TEACHER = "frozen layers", "frozen layers of the teacher"  # among what decides a run


@dataclass(frozen=True, kw_only=True)
class FrozenPlan:
    """What is done about the lower layers of a model.

    Attributes:
        layer: how many are frozen and computed apart from the others; 0 if all are computed with the others.
        limit_bytes: of the store; 0 to keep nothing.
        size_bytes: estimated size of the activations of all examples.
        reason: why they are computed with the others, in words; None if they are not, or nobody would expect it.
    """

    layer: int = 0
    limit_bytes: int = 0
    size_bytes: int = 0
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class EpochData:
    """What a run reads in every epoch, and what is done about its frozen layers.

    Attributes:
        job: settings of the run.
        splits: the training examples, then the validation examples if there are any.
        epochs: how often the run reads the training examples.
        prefix_end_id: see `FrozenLayers`.
        on_event: told of what happens to the activations.
        plans: by `STUDENT` and `TEACHER`; see `with_plans`.
    """

    job: LoRAJob
    splits: tuple[TokenTable, ...]
    epochs: float
    prefix_end_id: int
    on_event: Callback
    plans: Mapping[str, FrozenPlan] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, str]:
        """What of the plans decides the numbers of a run; whether something is kept does not."""
        return {name: f"{plan.layer}, in groups by length" for name, plan in self.plans.items() if plan.layer}

    def with_plans(
        self, folder: ModelFolder, teacher: ModelFolder | None, saved: SavedRun | None, ranks: Ranks
    ) -> EpochData:
        """The same with plans, made from settings and sizes alone: alike on all ranks, and as a saved run computed."""
        plans = {STUDENT: _plan_student(self, folder)}
        if teacher is not None:
            plans[TEACHER] = _plan_store(self, teacher, teacher.config.num_layers, self.splits)
        for name, plan in plans.items():
            if saved is not None and self.job.frozen_cache == AUTO:
                plans[name] = plan = _as_before(plan, saved.fingerprint["from"].get(name))
            if ranks.size > 1 and ranks.any(plan.reason is not None):
                plans[name] = FrozenPlan(reason=plan.reason or "another process cannot keep their activations")
        return replace(self, plans=plans)


def _as_before(plan: FrozenPlan, before: str | None) -> FrozenPlan:
    """The plan, computing in the way in which the run has computed so far."""
    if before is None:
        return FrozenPlan()
    return plan if plan.layer else FrozenPlan(layer=int(before.partition(",")[0]))  # the disk has less room now


def lowest_trained_layer(lora: LoRAConfig, config: AFMConfig) -> int:
    """How many layers from the bottom an adapter leaves as they are."""
    if lora.fine_tune_type in WHOLE_WEIGHTS and lora.layers == ALL:
        return 0  # the embedding is trained
    return min(chosen_layers(lora.layers, config))


def _plan_student(run: EpochData, folder: ModelFolder) -> FrozenPlan:
    job, layer = run.job, lowest_trained_layer(run.job.lora, folder.config)
    if layer == 0:
        asked = job.frozen_cache not in (AUTO, OFF)
        return FrozenPlan(reason="the lowest layer is trained, so none is frozen" if asked else None)
    if _adapter_below(job, folder) is not None and job.lora.dropout > 0:
        return FrozenPlan(reason="the adapter of the lower layers has dropout")
    return _plan_store(run, folder, layer, run.splits)


def _plan_store(run: EpochData, folder: ModelFolder, layer: int, splits: tuple[TokenTable, ...]) -> FrozenPlan:
    """Where the activations behind `layer` layers go."""
    wanted, cache = run.job.frozen_cache, run.job.cache
    if wanted == OFF:
        return FrozenPlan()
    size = stored_bytes(folder.config, layer, splits, _dtype_of(folder))
    if wanted == RECOMPUTE:
        return FrozenPlan(layer=layer, size_bytes=size)
    if wanted == AUTO and run.epochs <= 1:
        return FrozenPlan(reason="the run reads its data once; --frozen-cache SIZE keeps them for later runs")
    if cache is None:
        return FrozenPlan(reason="there is no cache folder (--no-cache, or MLX_AFM_CACHE=off)")
    limit = int(DISK_SHARE * free_bytes(cache)) if wanted == AUTO else parse_bytes(wanted)
    if wanted == AUTO and size > limit:
        free = f"{format_bytes(limit / DISK_SHARE)} of disk are free"
        return FrozenPlan(reason=f"their activations would take {format_bytes(size)}, and {free}")
    return FrozenPlan(layer=layer, limit_bytes=limit, size_bytes=size)


def _dtype_of(folder: ModelFolder) -> str:
    """The dtype of the residual stream."""
    norm = folder.tensors.get(NORM)
    return "float32" if norm is None else norm.dtype


def _adapter_below(job: LoRAJob, folder: ModelFolder) -> str | None:
    """What is on the lower layers besides the base model's own files."""
    if job.resume_adapter_file is not None:
        return "of another file"
    return "the base model's" if takes_base_adapter(folder, job.lora) else None


def stored_bytes(config: AFMConfig, layer: int, splits: tuple[TokenTable, ...], dtype: str) -> int:
    """Bytes that the activations of all examples take, without the heads of the records."""
    width = DTYPE_BYTES[dtype] * config.hidden_dim
    read = sum(len(table.ids) - len(table) for table in splits)
    if layer < config.num_ordinary_layers:
        return width * read
    trained = sum(int(table.trained.sum()) for table in splits)
    keys = 2 * config.kv_dim * (1 if config.kv_quant else DTYPE_BYTES[dtype])
    return width * trained + (keys * read if layer < config.num_layers else 0)


def remaining_share(config: AFMConfig, layer: int, splits: tuple[TokenTable, ...]) -> float:
    """Share of an epoch's time that is left once all is kept: counted in products, as if rows had nothing in common."""
    read = sum(len(table.ids) - len(table) for table in splits)
    trained = sum(int(table.trained.sum()) for table in splits)
    tokens = [read] * (config.num_ordinary_layers - 1) + [trained] * (config.num_kv_reuse_layers + 1)
    head = trained * config.vocab_size / (12 * config.hidden_dim)  # two products beside the 24 D^2 of a layer
    above = (1 + BACKWARD) * sum(tokens[layer:]) + head
    return above / (above + sum(tokens[:layer]))


@contextmanager
def frozen_below(run: EpochData, folder: ModelFolder, sources: dict[str, str]) -> Iterator[FrozenLayers | None]:
    """The lower layers of the model that is trained, if they are frozen.

    Args:
        run: with its plans.
        folder: of the model.
        sources: what decides the run: files by their fingerprints.
    """
    job, plan = run.job, run.plans[STUDENT]
    _tell_reason(run, plan, "the lower layers")
    if not plan.layer:
        yield None
        return
    adapter = _adapter_below(job, folder)

    def load() -> Model:
        below = folder.load_model(layers=range(plan.layer))
        if adapter is not None:
            start_adapter(below, folder, job.lora, seed=job.train.seed, adapter_file=job.resume_adapter_file)
        below.eval()
        return below

    about = {"adapter": adapter, "adapter file": sources.get(START_SOURCE)}
    with _opened(run, plan, folder, about, load) as layers:
        layers.expect(*run.splits)
        what = f"the {plan.layer} layers below the first trained one are frozen: their activations"
        share = f". An epoch then takes about {remaining_share(folder.config, plan.layer, run.splits):.0%} of the time"
        run.on_event(Notice(text=what + _describe(plan, layers, run.splits) + (share if plan.limit_bytes else "")))
        yield layers


@contextmanager
def frozen_teacher(
    run: EpochData,
    folder: ModelFolder,
    load: Callable[[], Model] | None = None,
    *,
    adapter: str | None = None,
    evaluates: bool = False,
) -> Iterator[FrozenLayers | None]:
    """All layers of a teacher, in inference, if the run computes them apart.

    Args:
        run: with its plans.
        folder: of the teacher.
        load: gives the teacher; by default with its own adapter.
        adapter: fingerprint of another adapter that it has.
        evaluates: whether evaluations ask the teacher too.
    """
    plan = run.plans[TEACHER]
    _tell_reason(run, plan, "the teacher's hidden states")
    if not plan.layer:
        yield None
        return
    about = {"adapter": adapter or "its own", "arithmetic": "inference"}
    with _opened(run, plan, folder, about, load or (lambda: folder.load_with(None))) as layers:
        splits = run.splits if evaluates else run.splits[:1]
        layers.expect(*splits)
        run.on_event(Notice(text="the teacher's hidden states" + _describe(plan, layers, splits)))
        yield layers


@contextmanager
def _opened(
    run: EpochData, plan: FrozenPlan, folder: ModelFolder, about: Mapping[str, str | None], load: Callable[[], Model]
) -> Iterator[FrozenLayers]:
    """Frozen layers over the store that has their activations, or over none."""
    about = {
        "format": str(FORMAT),
        "base model": folder.fingerprint,
        "layers": str(plan.layer),
        **about,
        "prefix end": str(run.prefix_end_id),
        "MLX": mx.__version__,  # type: ignore[attr-defined]
        "device": f"{mx.default_device()} {platform.machine()}",
    }
    if not plan.limit_bytes or run.job.cache is None:
        yield FrozenLayers(folder.config, plan.layer, load, prefix_end_id=run.prefix_end_id)
        return
    remove_unused_stores(run.job.cache / STORES, KEPT_DAYS)
    store = DiskStore(run.job.cache / STORES, about, plan.limit_bytes, notes_of(run.on_event))
    try:
        yield FrozenLayers(folder.config, plan.layer, load, store, prefix_end_id=run.prefix_end_id)
    finally:
        store.close()


def _tell_reason(run: EpochData, plan: FrozenPlan, what: str) -> None:
    if plan.reason is not None:
        run.on_event(Notice(text=f"{what} are computed in every step: {plan.reason}"))


def _describe(plan: FrozenPlan, layers: FrozenLayers, splits: tuple[TokenTable, ...]) -> str:
    if not isinstance(layers.store, DiskStore):
        return " are computed in every step, and not kept"
    total = sum(map(len, splits))
    return (
        f" are computed once for each example and kept in {layers.store.folder} "
        f"(about {format_bytes(plan.size_bytes)}; {max(0, total - layers.missing)} of {total} examples are there)"
    )
