"""How much a package's float16 values change what the model says, against the adapter it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_afm.adapters import Adapter, attach_adapter, read_adapter, remove_adapter
from mlx_afm.errors import ConfigError
from mlx_afm.generation import to_prompt_ids
from mlx_afm.model_folder import ModelFolder


@dataclass(frozen=True)
class LogitChange:
    """Logits with the adapter as it was trained against those with the package's values.

    Attributes:
        tokens: positions compared, over all prompts.
        max_change, mean_change: of a logit, absolute.
        largest_logit: the largest absolute logit, to judge them by.
        same_choice: share of the positions where the likeliest token is the same.
    """

    tokens: int
    max_change: float
    mean_change: float
    largest_logit: float
    same_choice: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)

    def note(self) -> str:
        """The figures in a sentence."""
        change = f"{self.max_change:.3g} at most and {self.mean_change:.3g} in the mean"
        return (
            f"logits change by {change} (largest logit {self.largest_logit:.3g}); "
            f"same first choice at {self.same_choice:.1%} of {self.tokens} positions"
        )


def logit_change(folder: ModelFolder, adapter: Adapter, package: Path, prompts: Sequence[str]) -> LogitChange:
    """Compares an adapter with the package made from it, in the model's own dtype.

    Args:
        folder: the base model.
        adapter: as it was trained; modules that it leaves out add nothing.
        package: made from it.
        prompts: what a user would say, each compared at every position.

    Raises:
        ConfigError: the model has no tokenizer, or there are no prompts.

    Cost: the model in memory, two passes per prompt, two times the logits of one prompt.
    """
    tokenizer = folder.tokenizer
    if tokenizer is None or not prompts:
        advice = "Convert the model again with tokenizer.model in place, or leave the comparison out (--no-compare)."
        raise ConfigError("logits cannot be compared without tokenizer and prompts", where=folder.path, advice=advice)
    model = folder.load_model()
    tokens = [mx.array([to_prompt_ids(tokenizer, prompt)]) for prompt in prompts]
    before: list[np.ndarray] = []
    for attached, where in ((adapter, "the adapter"), (read_adapter(package, model.args), package)):
        remove_adapter(model)
        attach_adapter(model, attached, where=where)
        logits = [np.array(model(ids)[0].astype(mx.float32)) for ids in tokens]
        before = before or logits
    after_LV, before_LV = np.concatenate(logits), np.concatenate(before)
    change_LV = np.abs(after_LV - before_LV)
    return LogitChange(
        tokens=len(change_LV),
        max_change=float(change_LV.max()),
        mean_change=float(change_LV.mean(dtype=np.float64)),
        largest_logit=float(np.abs(before_LV).max()),
        same_choice=float(np.mean(after_LV.argmax(-1) == before_LV.argmax(-1))),
    )
