"""Text from a model, on mlx-lm's generation loop and samplers (imported when first used)."""

from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.generate import generate, stream_generate, to_prompt_ids

__all__ = ["GenerateConfig", "generate", "stream_generate", "to_prompt_ids"]
