"""Which layers of a run are computed once and for all, where that is kept, and why not if not."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.adapters.layers import ALL, chosen_layers
from mlx_afm.data import TokenTable
from mlx_afm.files import format_bytes, free_bytes, parse_bytes
from mlx_afm.memory import DTYPE_BYTES
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.activation_store import STORES, DiskStore
from mlx_afm.runs.job import AUTO, OFF, RECOMPUTE, LoRAJob
from mlx_afm.training.frozen import FrozenLayers

FORMAT = 1  # of what a store holds; counted up when the arithmetic of the layers changes
DISK_SHARE = 0.5  # of the free disk that a store may fill
BACKWARD = 2.0  # forward passes that the backward pass of an unfrozen layer costs, with its products recomputed


@dataclass(frozen=True)
class FrozenPlan:
    """What is done about the layers below the first trained one.

    Attributes:
        layer: how many there are; 0 if they are computed with the others.
        limit_bytes: of the store; 0 to keep nothing.
        size_bytes: estimated size of the activations of all examples.
        reason: why they are computed with the others, in words; None if they are not, or nobody would expect it.
    """

    layer: int = 0
    limit_bytes: int = 0
    size_bytes: int = 0
    reason: str | None = None


def plan_frozen(
    job: LoRAJob,
    config: AFMConfig,
    data: Sequence[TokenTable],
    *,
    dtype: str,
    epochs: float,
    adapter_below: bool = False,
) -> FrozenPlan:
    """Decides before anything is loaded, from settings and sizes alone.

    Args:
        job: the run.
        config: sizes of the model.
        data: the splits that are read in every epoch.
        dtype: of the residual stream.
        epochs: how often the run goes over its data.
        adapter_below: whether there may be an adapter on the layers below.
    """
    wanted = job.frozen_cache
    layer = min(chosen_layers(job.lora.layers, config))
    if job.lora.fine_tune_type in WHOLE_WEIGHTS and job.lora.layers == ALL:
        layer = 0
    if wanted == OFF or (wanted == AUTO and layer == 0):
        return FrozenPlan()
    if layer == 0:
        return FrozenPlan(reason="layer 0 is trained, so no layer is frozen from the bottom")
    if adapter_below and job.lora.dropout > 0:
        return FrozenPlan(reason="the adapter of the layers below has dropout")
    return plan_store(job, config, layer, data, dtype=dtype, epochs=epochs)


def plan_store(
    job: LoRAJob, config: AFMConfig, layer: int, data: Sequence[TokenTable], *, dtype: str, epochs: float
) -> FrozenPlan:
    """Where the activations behind `layer` layers go; of a teacher all layers are frozen."""
    wanted = job.frozen_cache
    if wanted == OFF:
        return FrozenPlan()
    size = stored_bytes(config, layer, data, dtype)
    if wanted == RECOMPUTE:
        return FrozenPlan(layer, 0, size)
    if wanted == AUTO and epochs <= 1:
        return FrozenPlan(reason="the run reads its data once; --frozen-cache SIZE keeps them for later runs")
    if job.cache is None:
        return FrozenPlan(reason="there is no cache folder (--no-cache, or MLX_AFM_CACHE=off)")
    limit = int(DISK_SHARE * free_bytes(job.cache)) if wanted == AUTO else parse_bytes(wanted)
    if wanted == AUTO and size > limit:
        free = f"{format_bytes(2 * limit)} of disk are free"
        return FrozenPlan(reason=f"their activations would take {format_bytes(size)}, and {free}")
    return FrozenPlan(layer, limit, size)


def stored_bytes(config: AFMConfig, layer: int, data: Sequence[TokenTable], dtype: str) -> int:
    """Bytes that the activations of all examples take, without the heads of the records."""
    width = DTYPE_BYTES[dtype] * config.hidden_dim
    read = sum(len(table.ids) - len(table) for table in data)
    if layer < config.num_ordinary_layers:
        return width * read
    trained = sum(int(table.trained.sum()) for table in data)
    keys = 2 * config.kv_dim * (1 if config.kv_quant else DTYPE_BYTES[dtype])
    return width * trained + (keys * read if layer < config.num_layers else 0)


def saved_share(config: AFMConfig, plan: FrozenPlan, data: Sequence[TokenTable]) -> float:
    """Share of an epoch's time that is saved once all is kept, from products alone, without what rows share."""
    read = sum(len(table.ids) - len(table) for table in data)
    trained = sum(int(table.trained.sum()) for table in data)
    tokens = [read] * (config.num_ordinary_layers - 1) + [trained] * (config.num_kv_reuse_layers + 1)
    below, above = sum(tokens[: plan.layer]), sum(tokens[plan.layer :])
    head = trained * config.vocab_size / (12 * config.hidden_dim)  # in layers: two products of it beside twelve squares
    return below / (below + (1 + BACKWARD) * above + head)


def frozen_layers(
    plan: FrozenPlan,
    job: LoRAJob,
    folder: ModelFolder,
    *,
    adapter_below: str | None = None,
    load: Callable[[], Model],
    prefix_end_id: int,
    on_note: Callable[[str], None],
) -> FrozenLayers:
    """The frozen layers of a run, over the store that has their activations.

    Args:
        plan: from `plan_frozen` or `plan_store`.
        job: the run.
        folder: of the model that has these layers.
        adapter_below: see `adapter_digest`.
        load: gives a model with the layers below.
        prefix_end_id: see `FrozenLayers`.
        on_note: told if the store takes no more.
    """
    about = {
        "format": FORMAT,
        "base model": folder.fingerprint,
        "layers": plan.layer,
        "adapter below": adapter_below,
        "prefix end": prefix_end_id,
        "MLX": mx.__version__,  # type: ignore[attr-defined]
        "device": f"{mx.default_device()} {platform.machine()}",
    }
    store = None
    if plan.limit_bytes and job.cache is not None:
        store = DiskStore(job.cache / STORES, about, plan.limit_bytes, on_note)
    return FrozenLayers(folder.config, plan.layer, load, store, prefix_end_id=prefix_end_id)


def adapter_digest(model: Model, layer: int) -> str | None:
    """SHA-256 of the adapters on the layers below; None if there are none."""
    digest, some = hashlib.sha256(), False
    for number, part in enumerate(model.layers[:layer]):
        for name, array in tree_flatten(part.parameters()):
            if "lora_" in name:
                digest.update(f"{number} {name} {array.shape}".encode())
                digest.update(np.array(array.astype(mx.float32)).tobytes())
                some = True
    return digest.hexdigest() if some else None


def describe_frozen(plan: FrozenPlan, frozen: FrozenLayers, missing: int, data: Sequence[TokenTable]) -> str:
    """What is done about the layers below, in a sentence."""
    what = f"the {plan.layer} layers below the first trained one are frozen"
    if frozen.store is None:
        return f"{what}: their activations are computed for each example by itself, and not kept"
    there = sum(map(len, data)) - missing
    share = saved_share(frozen.config, plan, data)
    assert isinstance(frozen.store, DiskStore)
    return (
        f"{what}: their activations are computed once for each example and kept in {frozen.store.folder} "
        f"(about {format_bytes(plan.size_bytes)}; {there} of {there + missing} examples are there). "
        f"An epoch then takes about {1 - share:.0%} of its time"
    )


def describe_teacher(plan: FrozenPlan, frozen: FrozenLayers, missing: int, examples: int) -> str:
    """What is done about a teacher, in a sentence."""
    if not isinstance(frozen.store, DiskStore):
        return "the teacher computes its hidden states for each example by itself, and they are not kept"
    return (
        f"the teacher's hidden states are computed once for each example and kept in {frozen.store.folder} "
        f"(about {format_bytes(plan.size_bytes)}; {examples - missing} of {examples} examples are there)"
    )
