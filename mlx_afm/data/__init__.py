"""Training data: file -> DataRow -> Example -> Spans -> Tokens -> plan -> Batch, one way.

`sources` and `rows` read files. `data_formats` and `records` make examples and tokens of a row, `blocks` and `prepare`
of a block of rows, `workers` of many blocks at once, `read` of a split. `plan` decides which examples go together,
`batches` makes arrays.
"""

from mlx_afm.data.batches import Batch, Tokens, TokenTable, make_batch, padded_batch
from mlx_afm.data.check import check_data
from mlx_afm.data.config import DataConfig
from mlx_afm.data.fix import Fixed, fix_data
from mlx_afm.data.plan import Prefixes, find_prefixes, plan_batches, plan_in_order, plan_packed, require_fitting
from mlx_afm.data.read import cache_folder, default_cache, read_examples, read_tokens
from mlx_afm.data.records import Example
from mlx_afm.data.report import DataReport
from mlx_afm.data.sources import find_splits

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
