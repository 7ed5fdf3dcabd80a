"""Say how much memory a training run will take, before anything is loaded, and what would fit.

Only `config.json` and the headers of the weights are read; with data, its lengths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.checkpoints.mlx_checkpoint import NORM
from mlx_afm.checkpoints.names import Kind, plan_names
from mlx_afm.data import Tokens, make_batch
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.files import format_bytes
from mlx_afm.memory import Base, Layout, MemoryEstimate, estimate_training, layout_of
from mlx_afm.model import AFMConfig, ToolkitConfig
from mlx_afm.model_folder import ModelFolder
from mlx_afm.quant import QuantConfig, plan_schemes
from mlx_afm.runs.frozen import lowest_trained_layer
from mlx_afm.training import DataOrder, MemoryEstimated, TrainConfig

USABLE_SHARE = 0.75  # of a Mac's memory, what macOS recommends to the GPU at most; the rest is the system's
TRAINED_SHARE = 0.25  # of tokens, where there is no data to tell
MEASURED_BATCHES = 4  # the longest and the most trained of an epoch; each is laid out as it will be
MOST_ROWS = 1 << 12
# Keys a group of queries is brought in packed rows of short examples; see docs/decisions/0005.
PACKED_QUERIES, PACKED_KEYS = 64, 192

BASES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "8-bit": ("bfloat16", QuantConfig(bits=8)),
    "4-bit": ("bfloat16", QuantConfig(bits=4)),
    "2-bit": ("bfloat16", QuantConfig(recipe="apple")),
}


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run whose memory is asked for.

    Attributes:
        model: sizes.
        base: dtype and codes.
        lora, train: settings.
        layouts: shapes of its largest micro-batches.
        backend: "cpu" or "gpu", where it will run.
        unloaded_layers: lower layers that are not loaded, see `estimate_training`.
        stored_bytes: of their activations on disk; 0 if that is not known.
    """

    model: AFMConfig
    base: Base
    lora: LoRAConfig
    train: TrainConfig
    layouts: tuple[Layout, ...]
    backend: str
    unloaded_layers: int = 0
    stored_bytes: int = 0

    def estimate(self) -> MemoryEstimate:
        """The parts and the peak of the micro-batch that takes most."""
        every = (
            estimate_training(
                self.model,
                self.base,
                self.lora,
                layout,
                optimizer=self.train.optimizer,
                grad_checkpoint=self.train.grad_checkpoint,
                accumulated=self.train.grad_accumulation_steps > 1,
                backend=self.backend,
                unloaded_layers=self.unloaded_layers,
            )
            for layout in self.layouts
        )
        return max(every, key=lambda estimate: estimate.peak_bytes)


def backend() -> str:
    """Where MLX computes by default."""
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def machine_memory() -> int | None:
    """Bytes of memory of this machine, of its GPU if that has its own; None if nobody says."""
    known = mx.device_info().get("memory_size")
    if isinstance(known, int) and known > 0:
        return known
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def base_of(folder: ModelFolder) -> Base:
    """How a model folder holds its weights; headers alone are read."""
    norm = folder.tensors.get(NORM)
    return Base(dtype="float32" if norm is None else norm.dtype, schemes=folder.schemes)


def named_base(name: str, model: AFMConfig) -> Base:
    """A base by its name in `BASES`.

    Raises:
        ConfigError: another name.
    """
    if name not in BASES:
        raise SettingError("unknown form of base weights", expected=" or ".join(BASES), found=name)
    dtype, quantization = BASES[name]
    if quantization is None:
        return Base(dtype=dtype)
    weights = [e for e in plan_names(ToolkitConfig(model=model, adapter=None)) if e.kind is Kind.WEIGHT]
    shapes = {e.ours.removesuffix(".weight"): (e.shape[0], e.shape[1]) for e in weights if len(e.shape) == 2}
    return Base(dtype=dtype, schemes=plan_schemes(quantization, shapes).schemes)


def plan_of_folder(
    folder: ModelFolder, lora: LoRAConfig, train: TrainConfig, layouts: Sequence[Layout], *, unloaded_layers: int = 0
) -> RunPlan:
    """The run over a model folder, on this machine."""
    layouts = tuple(layouts)
    return RunPlan(
        model=folder.config,
        base=base_of(folder),
        lora=lora,
        train=train,
        layouts=layouts,
        backend=backend(),
        unloaded_layers=unloaded_layers,
    )


def layouts_of_data(data: Sequence[Tokens], train: TrainConfig) -> tuple[Layout, ...]:
    """Shapes of the micro-batches of the first epoch that take most: the longest, and the most trained."""
    plan = DataOrder(data, train).epoch(0)
    lengths = [len(tokens) for tokens in data]
    padded = [len(indices) * max(lengths[index] for index in indices) for indices in plan]
    order = sorted(range(len(plan)), key=lambda number: -padded[number])[: 2 * MEASURED_BATCHES]
    trained = sorted(order, key=lambda number: -_trained(data, plan[number]))
    chosen = dict.fromkeys([*order[:MEASURED_BATCHES], *trained[:MEASURED_BATCHES]])
    return tuple(layout_of(make_batch([data[index] for index in plan[number]])) for number in chosen)


def _trained(data: Sequence[Tokens], indices: Sequence[int]) -> int:
    return max(int((data[index].weights > 0).sum()) for index in indices) * len(indices)


def layout_by_settings(train: TrainConfig, tokens: int, share: float = TRAINED_SHARE) -> Layout:
    """The shape of a full micro-batch of examples of that length, or of a packed row.

    Args:
        train: the run.
        tokens: of each example.
        share: of the tokens that are trained, from 0 to 1.

    Raises:
        SettingError: another share.
    """
    if not 0 <= share <= 1:
        raise SettingError("trained_share out of range", expected="0 to 1", found=share)
    if train.batch_tokens is None:
        return Layout(rows=train.batch_size, tokens=tokens, output_positions=max(1, round(tokens * share)))
    size, outputs = train.batch_tokens, max(1, round(train.batch_tokens * share))
    reaches = [(math.ceil(count / PACKED_QUERIES), PACKED_QUERIES, PACKED_KEYS) for count in (size, outputs)]
    return Layout(rows=1, tokens=size, output_positions=outputs, reach=reaches[0], output_reach=reaches[1])


def largest_rows(plan: RunPlan, limit_bytes: float) -> int:
    """Most rows of the first layout's length that stay within a limit; 0 if one row does not."""

    def fits(rows: int) -> bool:
        return with_rows(plan, rows).estimate().peak_bytes <= limit_bytes

    low, high = 0, 1
    while high <= MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ways_to_fit(plan: RunPlan, limit_bytes: float) -> Iterator[tuple[str, int]]:
    """Settings that stay within a limit, the least change first: what to change, and the peak then."""
    for names, changed in _variants(plan):
        peak, rows = changed.estimate().peak_bytes, plan.layouts[0].rows
        if peak > limit_bytes and plan.layouts[0].reach is None:
            rows = largest_rows(changed, limit_bytes)
            peak = with_rows(changed, max(1, rows)).estimate().peak_bytes
            names = [*names, f"--batch-size {rows}"]
        if names and peak <= limit_bytes:
            yield " and ".join(names), peak


def _variants(plan: RunPlan) -> Iterator[tuple[list[str], RunPlan]]:
    """The plan, and what takes less and less memory."""
    names: list[str] = []
    yield names, plan
    if plan.lora.fine_tune_type in WHOLE_WEIGHTS:
        names, plan = [*names, "--fine-tune-type lora"], replace(plan, lora=LoRAConfig(layers=plan.lora.layers))
        yield names, plan
    if not plan.train.grad_checkpoint:
        names, plan = [*names, "--grad-checkpoint"], replace(plan, train=replace(plan.train, grad_checkpoint=True))
        yield names, plan
    if not plan.base.schemes:
        for name in ("4-bit", "2-bit"):
            yield [*names, f"a {name} base"], replace(plan, base=named_base(name, plan.model))


def with_rows(plan: RunPlan, rows: int) -> RunPlan:
    """The plan with micro-batches of so many examples of the first layout's length."""
    return replace(plan, layouts=(replace(plan.layouts[0], rows=rows, reach=None, output_reach=None),))


def require_memory(plan: RunPlan, memory_bytes: int | None) -> None:
    """Refuses a run that this machine cannot hold.

    Raises:
        ConfigError: the peak is above its memory; with settings that would fit.
    """
    peak = plan.estimate().peak_bytes
    if memory_bytes is None or peak <= memory_bytes:
        return
    ways = [f"{change}: {format_bytes(size)}" for change, size in ways_to_fit(plan, USABLE_SHARE * memory_bytes)]
    advice = "Shorten examples (--max-seq-length) or choose one of the settings below; --ignore-memory tries anyway."
    if not ways:
        advice = "Shorten examples (--max-seq-length), or find a larger machine; --ignore-memory tries anyway."
    expected = f"at most {format_bytes(memory_bytes)}, this machine's memory"
    what = "this run needs more memory than there is"
    raise ConfigError(what, expected=expected, found=f"a peak of {format_bytes(peak)}", advice=advice, details=ways)


def as_event(estimate: MemoryEstimate) -> MemoryEstimated:
    """The estimate as a run tells it."""
    return MemoryEstimated(
        peak_bytes=estimate.peak_bytes,
        weights_bytes=estimate.weights_bytes,
        state_bytes=estimate.adapter_bytes + estimate.optimizer_bytes,
        activations_bytes=estimate.activations_bytes,
        working_bytes=estimate.working_bytes,
        loss_bytes=estimate.loss_bytes,
    )


MACS_GB = (8, 16, 24, 32, 64)
ROW_TOKENS = 512  # of the examples in the table
TABLE_BASES = ("float32", "bfloat16", "4-bit", "2-bit")


def report(plan: RunPlan, memory_bytes: int | None, *, mac: bool) -> tuple[dict[str, Any], float | None]:
    """The parts in bytes, whether they fit, and what would; and the limit this was judged by.

    Args:
        plan: the run.
        memory_bytes: of the machine; None if it is not known.
        mac: judge by what macOS leaves to the GPU rather than by all of it.
    """
    estimate = plan.estimate()
    layout = max(plan.layouts, key=lambda layout: layout.rows * layout.tokens)
    found: dict[str, Any] = {
        **asdict(estimate),
        "rows": layout.rows,
        "tokens": layout.tokens,
        "needed": layout.output_positions,
    }
    if plan.stored_bytes:
        layers = lowest_trained_layer(plan.lora, plan.model)
        kept = replace(plan, unloaded_layers=layers).estimate()
        found |= {"frozen_layers": layers, "frozen_cache_bytes": plan.stored_bytes}
        found |= {"peak_bytes_once_kept": kept.peak_bytes}
    if memory_bytes is None:
        return {**found, "ways_to_fit": {}}, None
    limit = memory_bytes * (USABLE_SHARE if mac or plan.backend == "gpu" else 1.0)
    found |= {"memory_bytes": memory_bytes, "usable_bytes": round(limit), "fits": estimate.peak_bytes <= limit}
    if plan.train.batch_tokens is None:
        found["largest_batch_size"] = largest_rows(plan, limit)
    ways = {} if found["fits"] else dict(ways_to_fit(plan, limit))
    return {**found, "ways_to_fit": ways}, limit


def settings_table(plan: RunPlan, macs_gb: Sequence[int] = MACS_GB) -> list[dict[str, Any]]:
    """Most examples of 512 tokens a step, a quarter of them trained, by memory, base and checkpointing.

    0 means that not even one fits. Full settings are those of `plan`; its layouts and base are replaced.
    """
    layout = Layout(rows=1, tokens=ROW_TOKENS, output_positions=round(TRAINED_SHARE * ROW_TOKENS))
    rows = []
    for name in TABLE_BASES:
        assert name in BASES
        for checkpointed in (False, True):
            train = replace(plan.train, grad_checkpoint=checkpointed)
            base = named_base(name, plan.model)
            tried = replace(plan, base=base, train=train, layouts=(layout,), backend="gpu")
            most = {str(size): largest_rows(tried, size * 1e9 * USABLE_SHARE) for size in macs_gb}
            smallest = tried.estimate().peak_bytes
            rows.append({"base": name, "grad_checkpoint": checkpointed, "least_bytes": smallest, "rows": most})
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people: tokens a step."""
    macs = list(rows[0]["rows"])
    lines = [
        "| base | `--grad-checkpoint` | 1 x 512 tokens | " + " | ".join(f"{size} GB" for size in macs) + " |",
        "|---|---|---" + "|---" * len(macs) + "|",
    ]
    for row in rows:
        cells = [f"{count} x {ROW_TOKENS}" if count else "-" for count in row["rows"].values()]
        checkpointed = "yes" if row["grad_checkpoint"] else "no"
        start = f"| {row['base']} | {checkpointed} | {row['least_bytes'] / 1e9:.1f} GB | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)
