"""What a checkpoint of either form holds, and which dictionary in it is the state dict.

Byte layout: none of its own; `torch_zip` and `torch_legacy` find the parts, `torch_pickle` reads the tensors.
Limits: one wrapper deep. A dictionary of tensors only is the state dict itself. Otherwise exactly one of
`WRAPPER_KEYS` must hold a dictionary with tensors; what stands beside it (epoch, optimizer, ...) has been parsed by
the rules of `torch_opcodes` and is let go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mlx_afm.errors import FormatError
from mlx_afm.formats.torch_names import RawTensor
from mlx_afm.formats.zip_reader import Member

WRAPPER_KEYS = ("state_dict", "model", "model_state_dict", "module", "weights")


class Contents(NamedTuple):
    """A checkpoint taken apart.

    Attributes:
        value: what was saved, as `torch_opcodes` describes it.
        where: the place of its pickle, for messages.
        storages: place of each storage's bytes, by key.
    """

    value: object
    where: str
    storages: Mapping[str, Member]


def unwrap(value: object, where: object) -> tuple[object, str | None]:
    """The state dict in a saved value, and the key it was under; None if it is the value itself.

    A value in which none is found is given back as it is: `torch_pickle.specs_of` says what is wrong with it.

    Raises:
        FormatError: several keys hold tensors.
    """
    if type(value) is not dict or all(type(entry) is RawTensor for entry in value.values()):
        return value, None
    candidates = [key for key in WRAPPER_KEYS if _holds_tensors(value.get(key))]
    if len(candidates) > 1:
        raise FormatError(
            "several state dicts in one checkpoint",
            where=where,
            expected="one of them",
            found=", ".join(map(repr, candidates)),
            advice=f"Save the one that is meant: torch.save(checkpoint[{candidates[0]!r}], path)",
        )
    return (value[candidates[0]], candidates[0]) if candidates else (value, None)


def _holds_tensors(value: object) -> bool:
    return type(value) is dict and any(type(entry) is RawTensor for entry in value.values())
