"""What mlx-lm needs from us, and what it lacks for this architecture.

A dense folder loads in stock mlx-lm as it is. `register` goes further: in this process, mlx-lm's
`load`, `generate`, `server` and the rest then build our model for `model_type: afm7`, which loads our
adapters, is right in padded batches and takes quantized folders. These hold a shim, two lines that
mlx-lm runs with `--trust-remote-code`, so it loads them without `register` too.

Known gaps of mlx-lm's own `afm7` (0.32.2), each held by a test of ours:
  - adapters it trains cannot be loaded back: the fused projection keeps them in lists;
  - key and value adapters never train: rounding keys and values has gradient zero;
  - batches with left padding are wrong: reuse layers ignore the padding's offset;
  - rope_theta defaults to 50000, the model's is 500000;
  - it cannot be quantized: its fused projection takes no mode, which mlx-lm always passes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_afm.files import write_text
from mlx_afm.model import Model, ModelArgs

MODULE = "mlx_lm.models.afm7"
SHIM = "mlx_afm_model.py"
SHIM_TEXT = "from mlx_afm.interop import MlxLmModel as Model\nfrom mlx_afm.interop import ModelArgs\n"
NORM = "model.output_norm.weight"  # never quantized: its dtype is the model's


def register() -> None:
    """Makes mlx-lm use our model for `model_type: afm7` in this process. Calling it again does no harm."""
    module = ModuleType(MODULE, "AFM text v7 by mlx-afm.")
    module.Model = MlxLmModel  # type: ignore[attr-defined]
    module.ModelArgs = ModelArgs  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    _pass_over_shims()


def write_shim(folder: Path) -> dict[str, str]:
    """Writes what tells mlx-lm where our model is; returns the key of `config.json` that names it."""
    write_text(folder / SHIM, SHIM_TEXT)
    return {"model_file": SHIM}


def _pass_over_shims() -> None:
    """Lets mlx-lm load our quantized folders without trust in their code: what is registered is that code."""
    from mlx_lm import utils

    read_config = utils.load_config
    if hasattr(read_config, "passes_over_shims"):
        return

    @wraps(read_config)
    def load_config(model_path: Path) -> dict[str, Any]:
        config: dict[str, Any] = read_config(model_path)
        if config.get("model_type") == "afm7" and config.get("model_file") == SHIM:
            del config["model_file"]
        return config

    load_config.passes_over_shims = True  # type: ignore[attr-defined]
    utils.load_config = load_config


class MlxLmModel(Model):
    """Our model with mlx-lm's own caches, which its batch generator and server merge and split."""

    def make_cache(self, left_padding: Sequence[int] | None = None, *, quantized: bool = False) -> list[Any]:
        """One cache per ordinary layer, of mlx-lm's classes unless it is to hold int8."""
        from mlx_lm.models.cache import BatchKVCache, KVCache

        if quantized:
            return super().make_cache(left_padding, quantized=True)
        return [KVCache() if left_padding is None else BatchKVCache(list(left_padding)) for _ in self.model.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights as they are. The model takes their dtype, which codes alone would not tell it."""
        if NORM in weights:
            self.set_dtype(weights[NORM].dtype)
        return weights
