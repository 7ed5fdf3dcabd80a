"""Training data: JSON lines -> Example -> Tokens -> plan -> Batch, one way."""

from mlx_afm.data.batches import Batch, make_batch, plan_batches, plan_in_order
from mlx_afm.data.encode import encode_example, encode_examples
from mlx_afm.data.records import Example, parse_line, read_examples
from mlx_afm.data.tokens import Tokens

__all__ = [
    "Batch",
    "Example",
    "Tokens",
    "encode_example",
    "encode_examples",
    "make_batch",
    "parse_line",
    "plan_batches",
    "plan_in_order",
    "read_examples",
]
