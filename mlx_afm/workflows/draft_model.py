"""A draft model from its folder, for speculative decoding.

Apart from `load`, which would start slower with the engine's imports.
"""

from __future__ import annotations

from pathlib import Path

from mlx_afm.generation.speculation import Speculation, require_pair
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.load import load


def load_draft(
    path: str | Path, target: Model, tokenizer: AFMTokenizer | None, num_draft_tokens: int | None = 5
) -> Speculation:
    """The draft model of a folder, for a target.

    Args:
        path: MLX folder of the draft model, or the hub id of one; it needs no tokenizer.
        target, tokenizer: the model that it proposes tokens to.
        num_draft_tokens: how many; None adapts.

    Raises:
        ConfigError: another vocabulary. FormatError, TensorsError: the folder cannot be read.
    """
    draft, draft_tokenizer = load(path)
    require_pair(target, draft, tokenizer, draft_tokenizer)
    return Speculation(draft=draft, num_draft_tokens=num_draft_tokens)
