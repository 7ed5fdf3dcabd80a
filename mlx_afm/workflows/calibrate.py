"""What a dense model's projections read, measured on examples: how much an error in each column of a weight counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_unflatten

from mlx_afm.adapters import Adapter, attach_adapter, fuse_adapter, is_zero
from mlx_afm.checkpoints.arrays import to_mlx
from mlx_afm.checkpoints.quantized import matrices
from mlx_afm.data import DataConfig, Tokens, read_tokens
from mlx_afm.data.sources import require_splits
from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.files import set_paths
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.model import AFMConfig, Model
from mlx_afm.model.projections import FusedLinear, Linear
from mlx_afm.quant import QuantConfig, plan_schemes
from mlx_afm.quant.scheme import BALANCED
from mlx_afm.training import Callback, StageProgress
from mlx_afm.training.hooks import ignore

EXAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which examples a model is watched on.

    Attributes:
        data: a file of examples, or a folder whose train split is taken; str or `Path`.
        examples: so many, evenly spread over the file; all if there are fewer.
        data_config: how they become tokens.

    Raises:
        SettingError: fewer than one example.
    """

    data: Path
    examples: int = EXAMPLES
    data_config: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        set_paths(self, "data")
        if isinstance(self.examples, bool) or not isinstance(self.examples, int) or self.examples < 1:
            raise SettingError("calibration_examples out of range", expected="at least 1", found=self.examples)


@dataclass(frozen=True)
class Source:
    """A dense model that is about to be quantized: tensors by our names, sizes, its tokenizer and its own adapter."""

    tensors: Mapping[str, LazyTensor]
    base: AFMConfig
    tokenizer: Path | None
    adapter: Adapter | None


def calibrated(
    config: QuantConfig, source: Source, calibration: Calibration, on_event: Callback = ignore, *, weighs_start: bool
) -> QuantConfig:
    """The same way of quantizing, with column weights measured on examples.

    Args:
        config: how the model is to be quantized.
        source: the model.
        calibration: the examples.
        on_event: is given the progress, in examples.
        weighs_start: an adapter's start value will be made by these weights too.

    Raises:
        ConfigError: no tokenizer, or nothing would come of it. FormatError, DataError: see `read_tokens`.

    Cost: the dense model in memory, and a forward pass of each example by itself.
    """
    plan = plan_schemes(config, matrices(source.tensors))
    if not weighs_start and not any(scheme.mode == BALANCED for scheme in plan.schemes.values()):
        advice = "Quantize with --q-mode balanced or --q-recipe apple, or leave the calibration data out."
        raise ConfigError("calibration data changes nothing here: only balanced scales are fitted", advice=advice)
    if source.tokenizer is None:
        raise ConfigError("calibration data without a tokenizer", advice="Put tokenizer.model beside the model.")
    table = read_tokens(require_splits(calibration.data, "train")["train"], source.tokenizer, calibration.data_config)
    count = min(calibration.examples, len(table))
    chosen = [table[int(index)] for index in np.linspace(0, len(table) - 1, count).round()]
    weights = column_weights(_model_of(source), _counted(chosen, on_event))
    return replace(config, column_weights={**config.column_weights, **weights})


def _counted(examples: Sequence[Tokens], on_event: Callback) -> Iterator[Tokens]:
    """The examples; each is done when the next one is asked for."""
    for done, example in enumerate(examples, 1):
        yield example
        on_event(StageProgress(stage="calibrating", done=done, total=len(examples), unit="examples"))


def _model_of(source: Source) -> Model:
    """The dense model with its own adapter merged."""
    model = Model(source.base)
    model.load_weights([(name, to_mlx(tensor)) for name, tensor in source.tensors.items()])
    if source.adapter is not None and not is_zero(source.adapter):
        attach_adapter(model, source.adapter, where="the base adapter")
        fuse_adapter(model)
    return model


class _Watched(nn.Module):  # type: ignore[misc]
    """A projection that adds up the squares of its inputs."""

    def __init__(self, inner: nn.Module, columns: int) -> None:
        super().__init__()
        self.inner, self._squares = inner, mx.zeros((columns,))  # an underscore: not one of the model's tensors

    def __call__(self, x: mx.array, *others: Any) -> Any:
        wide = x.astype(mx.float32).reshape(-1, x.shape[-1])
        self._squares = self._squares + mx.sum(mx.square(wide), axis=0)
        return self.inner(x, *others)

    def plus(self, x: mx.array, residual: mx.array) -> mx.array:
        projected: mx.array = self(x)
        return residual + projected


def column_weights(model: Model, examples: Sequence[Tokens] | Iterable[Tokens]) -> dict[str, npt.NDArray[np.float64]]:
    """By module path the mean square of each input of the projections, float64 (N,).

    Projections that read zeros alone are left out. The model is as it was afterwards, but for being in eval mode.
    """
    inner = {path: m for path, m in model.named_modules() if isinstance(m, (Linear, FusedLinear))}
    watched = {path: _Watched(module, module.weight.shape[1]) for path, module in inner.items()}
    model.update_modules(tree_unflatten(list(watched.items())))
    model.eval()  # the watching ones too: a checkpointed pass would run them twice
    tokens = 0
    try:
        for example in examples:
            mx.eval(model.hidden(mx.array(example.ids)[None]), [module._squares for module in watched.values()])
            tokens += len(example)
    finally:
        model.update_modules(tree_unflatten(list(inner.items())))
    means = {path: np.array(module._squares).astype(np.float64) / max(tokens, 1) for path, module in watched.items()}
    return {path: mean for path, mean in means.items() if mean.any()}
