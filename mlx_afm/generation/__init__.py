"""Text from a model: one prompt or many, token by token or whole.

`engine` answers requests in one batch; `decode` runs its steps, `batch_cache` and `prefix_cache` hold keys and values,
`sampling` chooses tokens, `text_stream` makes text of them. `generate`, `answers`, `jsonl` and `chat` are its callers
here. mlx-lm's parts are imported when first used.
"""

from mlx_afm.generation.answers import Answer, batch_generate, iter_answers
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.engine import Engine
from mlx_afm.generation.generate import GenerationResponse, generate, stream_generate
from mlx_afm.generation.prefix_cache import PrefixCache, PromptCache
from mlx_afm.generation.prompt_cache import load_prompt_cache, save_prompt_cache
from mlx_afm.generation.prompts import to_prompt_ids
from mlx_afm.generation.rows import Request, Row, TokenEvent
from mlx_afm.generation.sampling import Sampler, TokenLogprob
from mlx_afm.generation.text_stream import TextStream

__all__ = [
    "Answer",
    "Engine",
    "GenerateConfig",
    "GenerationResponse",
    "PrefixCache",
    "PromptCache",
    "Request",
    "Row",
    "Sampler",
    "TextStream",
    "TokenEvent",
    "TokenLogprob",
    "batch_generate",
    "generate",
    "iter_answers",
    "load_prompt_cache",
    "save_prompt_cache",
    "stream_generate",
    "to_prompt_ids",
]
