"""An adapter in the one form that devices and the toolkit take: rank 32, scale 0.5, every projection of every layer.

What can be said exactly is: a smaller rank is padded with zero columns of A and zero rows of B, another scale
s is folded into B as s / 0.5, and a module that was not trained carries the base model's own tensors::

    A (in, 2) B (2, out), scale 2     ->     A 0 .. 0 (in, 32)     4 B above zeros (32, out), scale 0.5

A larger rank can only be approximated: on request by the nearest matrix of that rank (a truncated
singular value decomposition), whose error is stated. DoRA and full fine-tuning have no such form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.adapters.config import DEFAULT_SCALE, LoRAConfig
from mlx_afm.adapters.store import Adapter, adapter_shapes
from mlx_afm.adapters.toolkit_forms import require_lora
from mlx_afm.checkpoints.arrays import cast
from mlx_afm.errors import AdapterError
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.tree import require_same_tensors

DEVICE_RANK = 32
SHOWN_MODULES = 10


@dataclass(frozen=True, kw_only=True)
class DeviceForm:
    """The form wanted, and what may be done to get there.

    Attributes:
        rank, scale: of the result; other models than Apple's may have others.
        reduce_rank: approximate a larger rank instead of refusing it.
        zero_untrained: without the base model's own tensors, give untrained modules zeros instead of refusing.
    """

    rank: int = DEVICE_RANK
    scale: float = DEFAULT_SCALE
    reduce_rank: bool = False
    zero_untrained: bool = False


@dataclass(frozen=True)
class FormChange:
    """What was done to an adapter.

    Attributes:
        rank, scale: what it had.
        form: what it has now.
        untrained: modules that the adapter does not have.
        filled_from: where theirs come from: "base model", "zeros", or "" if there are none.
        reduction_errors: module -> relative error (Frobenius norm) of its update; filled in as tensors are read.
    """

    rank: int
    scale: float
    form: DeviceForm
    untrained: tuple[str, ...] = ()
    filled_from: str = ""
    reduction_errors: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether, but for rounding, the adapter does what it did."""
        return self.rank <= self.form.rank

    @property
    def max_reduction_error(self) -> float:
        """Largest relative error of a module's update."""
        return max(self.reduction_errors.values(), default=0.0)

    @property
    def mean_reduction_error(self) -> float:
        """Mean over the modules of the relative error of the update."""
        return sum(self.reduction_errors.values()) / max(1, len(self.reduction_errors))

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "rank": self.rank,
            "scale": self.scale,
            "to_rank": self.form.rank,
            "to_scale": self.form.scale,
            "untrained_modules": len(self.untrained),
            "filled_from": self.filled_from,
            "max_reduction_error": self.max_reduction_error,
            "mean_reduction_error": self.mean_reduction_error,
        }

    def notes(self) -> Iterator[str]:
        """What was done, a sentence each."""
        form = self.form
        if self.rank < form.rank:
            yield f"rank {self.rank} padded to {form.rank} with zeros: exact"
        if self.rank > form.rank:
            error = f"{self.max_reduction_error:.3g} at most, {self.mean_reduction_error:.3g} in the mean"
            yield f"rank {self.rank} reduced to {form.rank}: relative error of a module's update {error}"
        if self.scale != form.scale:
            factor = f"times {self.scale / form.scale:g}"
            yield f"scale {self.scale:g} folded into B ({factor}): devices apply {form.scale:g}"
        if self.untrained:
            source = "zeros" if self.filled_from == "zeros" else "the base model's own tensors"
            yield f"{len(self.untrained)} modules that were not trained carry {source}"


def to_device_form(
    adapter: Adapter, base_adapter: Adapter | None = None, form: DeviceForm | None = None
) -> tuple[Adapter, FormChange]:
    """The adapter with the rank and scale wanted on every module, and what was done; values stay on disk.

    Args:
        adapter: of LoRA, with the sizes of its model known.
        base_adapter: the adapter that belongs to the base model, for modules that were not trained.
        form: what is wanted; by default what devices take.

    Raises:
        AdapterError: not LoRA; a larger rank, or modules left out, without the leave that `form` can give.
        TensorsError: other tensors than the adapter's configuration says, all listed.

    Cost: an adapter already of this form is passed on as it is. Reducing reads and decomposes a module when
        its first tensor is read, and keeps one module in memory.
    """
    form = form or DeviceForm()
    require_lora(adapter, "the form that devices take")
    change = FormChange(adapter.config.rank, adapter.config.scale, form)
    if adapter.config.rank > form.rank and not form.reduce_rank:
        advice = f"Reduce it by --reduce-rank, which states the error, or train with --rank {form.rank} or less."
        raise AdapterError(
            "devices take one rank only", expected=f"at most {form.rank}", found=adapter.config.rank, advice=advice
        )
    base = adapter.require_base()
    found = {name: tensor.shape for name, tensor in adapter.weights.items()}
    advice = "Is the file whole, and its configuration its own?"
    require_same_tensors(adapter_shapes(base, adapter.config), found, where="adapter", advice=advice)
    shapes = adapter_shapes(base, LoRAConfig(rank=form.rank, scale=form.scale))
    names = [name.removesuffix(".lora_a") for name in shapes if name.endswith(".lora_a")]
    untrained = tuple(name for name in names if f"{name}.lora_a" not in adapter.weights)
    if untrained:
        base_adapter = _require_fill(untrained, base_adapter, form)
        change = replace(change, untrained=untrained, filled_from="base model" if base_adapter else "zeros")
    weights: dict[str, LazyTensor] = {}
    for name in names:
        source = base_adapter if f"{name}.lora_a" not in adapter.weights else adapter
        shape_a, shape_b = shapes[f"{name}.lora_a"], shapes[f"{name}.lora_b"]
        a, b = _zeros(shape_a, shape_b) if source is None else _pair(source, name, shape_a, shape_b, change)
        weights[f"{name}.lora_a"], weights[f"{name}.lora_b"] = a, b
    config = LoRAConfig(rank=form.rank, scale=form.scale, dropout=adapter.config.dropout)
    return Adapter(config, base, weights, adapter.name, adapter.system_prompts), change


def _require_fill(untrained: tuple[str, ...], base_adapter: Adapter | None, form: DeviceForm) -> Adapter | None:
    """What untrained modules are filled from: the base model's adapter; None, for zeros, if that is allowed."""
    if base_adapter is not None:
        missing = [name for name in untrained if f"{name}.lora_a" not in base_adapter.weights]
        if not missing and base_adapter.config.fine_tune_type == "lora":
            if base_adapter.config.rank > form.rank:
                found = base_adapter.config.rank
                raise AdapterError("the base model's own adapter is too large", expected=form.rank, found=found)
            return base_adapter
    if form.zero_untrained:
        return None
    raise AdapterError(
        f"{len(untrained)} modules were not trained, and the base model's own tensors for them are not at hand",
        expected="a base model folder with base_adapter/, which `mlx-afm convert` writes from base-model.pt",
        found="none" if base_adapter is None else "one without these modules",
        advice="Give it with --model; or say --zero-untrained, if you know that its own tensors change nothing.",
        details=[*untrained[:SHOWN_MODULES], *["..."] * (len(untrained) > SHOWN_MODULES)],
    )


Shape = tuple[int, ...]


def _zeros(shape_a: Shape, shape_b: Shape) -> tuple[LazyTensor, LazyTensor]:
    a, b = (LazyTensor("float32", shape, partial(np.zeros, shape, np.float32)) for shape in (shape_a, shape_b))
    return a, b


def _pair(
    source: Adapter, name: str, shape_a: Shape, shape_b: Shape, change: FormChange
) -> tuple[LazyTensor, LazyTensor]:
    a, b = (cast(source.weights[f"{name}.{side}"], "float32") for side in ("lora_a", "lora_b"))
    factor = source.config.scale / change.form.scale
    if source.config.rank > change.form.rank:
        reduced = _Reduced(name, a, b, change.form.rank, change.reduction_errors)
        a = LazyTensor("float32", (shape_a[0], reduced.kept), lambda: reduced.values()[0])
        b = LazyTensor("float32", (reduced.kept, shape_b[1]), lambda: reduced.values()[1])
    return _padded(a, shape_a, 1.0), _padded(b, shape_b, factor)


def _padded(tensor: LazyTensor, shape: Shape, factor: float) -> LazyTensor:
    if tensor.shape == shape and factor == 1:
        return tensor

    def read() -> npt.NDArray[np.float32]:
        values = np.zeros(shape, np.float32)
        rows, columns = tensor.shape
        with np.errstate(over="ignore", invalid="ignore"):  # refused, with its name, where values are checked
            values[:rows, :columns] = tensor.read_values() * np.float32(factor)
        return values

    return LazyTensor("float32", shape, read)


class _Reduced:
    """The nearest pair of a smaller rank to A B; computed when a value is asked for, and dropped once both were."""

    def __init__(self, name: str, a: LazyTensor, b: LazyTensor, rank: int, errors: dict[str, float]) -> None:
        self.name, self.a, self.b, self.errors = name, a, b, errors
        self.kept = min(rank, a.shape[0], b.shape[1])
        self._pair: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None
        self._asked = 0

    def values(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A (in, kept) and B (kept, out), balanced: each carries the square root of the singular values."""
        pair = self._pair or self._decompose()
        self._asked += 1
        self._pair = None if self._asked % 2 == 0 else pair
        return pair

    def _decompose(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        a, b = self.a.read_values().astype(np.float64), self.b.read_values().astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            advice = "The training diverged: export an earlier adapter"
            raise AdapterError("values are infinite or not numbers", where=self.name, advice=advice)
        # A = Qa Ra and B' = Qb Rb, so A B = Qa (Ra Rb') Qb': what is decomposed is no larger than the rank.
        (root_a, basis_a), (root_b, basis_b) = _roots(a), _roots(b.T)
        left, singular, right = np.linalg.svd(root_a @ root_b.T)
        kept, total = self.kept, float(np.sqrt(np.sum(singular**2)))
        self.errors[self.name] = float(np.sqrt(np.sum(singular[kept:] ** 2))) / total if total else 0.0
        root = np.sqrt(singular[:kept])
        new_a = a @ (basis_a @ left[:, :kept] * root)
        new_b = (root[:, None] * (right[:kept] @ basis_b.T)) @ b
        return new_a.astype(np.float32), new_b.astype(np.float32)


def _roots(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """R and X, both (R, R), of values (n, R): values X has orthonormal columns, or zeros, and values = values X R.

    From the Gram matrix, which is a hundred times faster than a QR decomposition of so tall a matrix and
    loses only directions 1e8 times weaker than the strongest.
    """
    squares, vectors = np.linalg.eigh(values.T @ values)
    kept = squares > squares[-1] * len(squares) * np.finfo(np.float64).eps
    root = np.sqrt(np.where(kept, squares, 0.0))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return root[:, None] * vectors.T, vectors * inverse
