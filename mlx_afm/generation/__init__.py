"""Text from a model: one prompt or many, token by token or whole.

`prompts` makes ids, `steps` and `batch` tokens, `sampling` chooses them, `answer_text` and `answers` make text of them,
`prompt_cache` keeps what prompts have in common, `jsonl` answers files. mlx-lm's parts are imported when first used.
"""

from mlx_afm.generation.answer_text import AnswerText
from mlx_afm.generation.answers import Answer, batch_generate, iter_answers
from mlx_afm.generation.batch import BatchGenerator, Request, RowStep
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.generate import generate, stream_generate
from mlx_afm.generation.prompt_cache import PrefixCache, PromptCache, load_prompt_cache, save_prompt_cache
from mlx_afm.generation.prompts import to_prompt_ids

__all__ = [
    "Answer",
    "AnswerText",
    "BatchGenerator",
    "GenerateConfig",
    "PrefixCache",
    "PromptCache",
    "Request",
    "RowStep",
    "batch_generate",
    "generate",
    "iter_answers",
    "load_prompt_cache",
    "save_prompt_cache",
    "stream_generate",
    "to_prompt_ids",
]
