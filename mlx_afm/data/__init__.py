"""Training data: file -> DataRow -> Example -> Spans -> Tokens -> plan -> Batch, one way.

`sources` and `dialects` read files, `records` and `encode` make tokens of a row, `prepare` does both
for a block of rows, `workers` for many blocks at once, `read` for a split; `prefixes` and `plan` decide
which examples go together, `packing` and `batches` make arrays.
"""

from mlx_afm.data.batches import Batch, make_batch, padded_batch
from mlx_afm.data.check import check_data
from mlx_afm.data.config import DataConfig
from mlx_afm.data.fix import Fixed, fix_data
from mlx_afm.data.plan import plan_batches, plan_in_order, plan_packed, require_fitting
from mlx_afm.data.prefixes import Prefixes, find_prefixes
from mlx_afm.data.read import cache_folder, default_cache, read_examples, read_tokens
from mlx_afm.data.records import Example
from mlx_afm.data.report import DataReport
from mlx_afm.data.sources import find_splits
from mlx_afm.data.tokens import Tokens, TokenTable

__all__ = [
    "Batch",
    "DataConfig",
    "DataReport",
    "Example",
    "Fixed",
    "Prefixes",
    "TokenTable",
    "Tokens",
    "cache_folder",
    "check_data",
    "default_cache",
    "find_prefixes",
    "find_splits",
    "fix_data",
    "make_batch",
    "padded_batch",
    "plan_batches",
    "plan_in_order",
    "plan_packed",
    "read_examples",
    "read_tokens",
    "require_fitting",
]
