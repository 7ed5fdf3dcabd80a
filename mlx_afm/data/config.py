"""Settings of how training data is read, with their defaults and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_afm.data.data_formats import DATA_FORMATS, FIELD_NAMES
from mlx_afm.errors import SettingError
from mlx_afm.spelling import nearest_name
from mlx_afm.text.system_prompt import system_fault
from mlx_afm.text.template import DEFAULT_SYSTEM

CONTEXT_TOKENS = 4096  # the model's context
TRUNCATIONS = ("error", "drop", "truncate-prompt", "truncate-answer")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything, besides the file and the tokenizer, that decides which tokens a line becomes.

    Attributes:
        data_format: form of the records, one of `DATA_FORMATS`; "auto" tells it from each record's keys.
        fields: (name, column) pairs: read the record's `column` where the data format says `name`.
        transform: `module:function`, called with (messages, index) of each conversation; returns messages.
        system: system prompt of conversations without a system message; None, or "", for no system turn.
        max_tokens: longest example.
        truncation: what becomes of a longer one: `error` refuses the data, `drop` leaves the example
            out, `truncate-prompt` takes tokens from the middle of its longest user and tool texts,
            `truncate-answer` cuts its end off, as the toolkit does.

    Raises:
        SettingError: settings out of range; all in one error.
    """

    data_format: str = "auto"
    fields: tuple[tuple[str, str], ...] = ()
    transform: str | None = None
    system: str | None = DEFAULT_SYSTEM
    max_tokens: int = CONTEXT_TOKENS
    truncation: str = "error"

    def __post_init__(self) -> None:
        if self.system == "":
            object.__setattr__(self, "system", None)
        if faults := list(self._faults()):
            raise SettingError("data settings out of range", details=faults)

    def _faults(self) -> Iterator[str]:
        if self.data_format not in ("auto", *DATA_FORMATS):
            yield f"data_format: expected auto or one of {', '.join(DATA_FORMATS)}, found {self.data_format}"
        if self.truncation not in TRUNCATIONS:
            yield f"truncation: expected one of {', '.join(TRUNCATIONS)}, found {self.truncation}"
        for name, column in self.fields:
            if name not in FIELD_NAMES:
                near = nearest_name(name, FIELD_NAMES)
                advice = "" if near is None else f"; is it {near}?"
                yield f"field: expected one of {', '.join(FIELD_NAMES)} before =, found {name}={column}{advice}"
        if twice := sorted({name for name, _ in self.fields if [n for n, _ in self.fields].count(name) > 1}):
            yield f"field: expected each name once, found {', '.join(twice)} more than once"
        if self.max_tokens < 2:
            yield f"max_tokens: expected at least 2, found {self.max_tokens}"
        if self.transform is not None and not all(self.transform.partition(":")):
            yield f"transform: expected module:function, found {self.transform!r}"
        if self.system is not None and self.system != self.system.strip(" "):
            yield f"system: expected a text without spaces around it, found {self.system!r}"
        if (fault := system_fault(self.system)) is not None:
            yield f"system: {fault}"
