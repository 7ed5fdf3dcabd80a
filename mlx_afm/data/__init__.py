"""Training data: file -> Row -> Example -> Spans -> Tokens -> plan -> Batch, one way.

`sources` and `dialects` read files, `records` and `encode` make tokens of a row, `prepare` does both
for a block of rows, `workers` for many blocks at once, `read` for a split; `batches` makes arrays.
"""

from mlx_afm.data.batches import Batch, make_batch, plan_batches, plan_in_order
from mlx_afm.data.config import DataConfig
from mlx_afm.data.read import default_cache, read_examples, read_tokens
from mlx_afm.data.records import Example
from mlx_afm.data.sources import find_splits
from mlx_afm.data.tokens import Tokens, TokenTable

__all__ = [
    "Batch",
    "DataConfig",
    "Example",
    "TokenTable",
    "Tokens",
    "default_cache",
    "find_splits",
    "make_batch",
    "plan_batches",
    "plan_in_order",
    "read_examples",
    "read_tokens",
]
