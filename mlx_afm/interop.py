"""What mlx-lm needs from us, and what it lacks for this architecture.

A dense folder loads in stock mlx-lm as it is. `register` goes further: in this process, mlx-lm's
`load`, `generate`, `server` and the rest then build our model for `model_type: afm7`, which loads our
adapters and is right in padded batches.

Known gaps of mlx-lm's own `afm7` (0.32.2), each held by a test of ours:
  - adapters it trains cannot be loaded back: the fused projection keeps them in lists;
  - key and value adapters never train: rounding keys and values has gradient zero;
  - batches with left padding are wrong: reuse layers ignore the padding's offset;
  - rope_theta defaults to 50000, the model's is 500000.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from mlx_afm.model import AFMConfig, Model

MODULE = "mlx_lm.models.afm7"


def register() -> None:
    """Makes mlx-lm use our model for `model_type: afm7` in this process. Calling it again does no harm."""
    module = ModuleType(MODULE, "AFM text v7 by mlx-afm.")
    module.Model = MlxLmModel  # type: ignore[attr-defined]
    module.ModelArgs = AFMConfig  # type: ignore[attr-defined]
    sys.modules[MODULE] = module


class MlxLmModel(Model):
    """Our model with mlx-lm's own caches, which its batch generator and server merge and split."""

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[Any]:
        """One cache per ordinary layer, of mlx-lm's classes."""
        from mlx_lm.models.cache import BatchKVCache, KVCache

        return [KVCache() if left_padding is None else BatchKVCache(list(left_padding)) for _ in self.model.layers]
