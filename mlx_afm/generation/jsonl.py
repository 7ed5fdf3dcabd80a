"""A file of conversations to the prompts in it, and a file of answers that survives being killed.

A line of answers:

    {"line": 3, "answer": "ls docs", "finish_reason": "stop", "prompt_tokens": 31, "generation_tokens": 4, "run": ""}

`line` is the prompt's place in its file; `run` is a digest of the prompt and of all that the answer depends on.
While answers are made they are lines of `NAME.part`, in the order they finish; `NAME` itself is written when all are
there, at once and in the order of the prompts, so nobody ever finds half a line in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from mlx_afm.data.data_formats import ANSWERS, read_record
from mlx_afm.data.json_text import parse_json
from mlx_afm.data.rows import DataRow, not_utf8
from mlx_afm.data.sources import file_faults, iter_rows
from mlx_afm.errors import ConfigError, DataError, FormatError
from mlx_afm.files import atomic_file, to_json
from mlx_afm.generation.answers import Answer, seeded
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.prompts import to_prompt_ids
from mlx_afm.generation.rows import Request
from mlx_afm.generation.sampling import LogitsProcessor
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.tree import shorten

# Settings that do not change an answer.
FREE = ("kv_bits", "prefill_step_size")


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a file.

    Attributes:
        line: its place in the file, counted from 1.
        request: the prompt, and how to answer it: it draws with the common seed plus its number in the file.
    """

    line: int
    request: Request

    def guided(self, processor: LogitsProcessor) -> PromptRow:
        """The same prompt, whose answer a processor keeps in bounds."""
        return replace(self, request=replace(self.request, logits_processors=(processor,)))


def read_prompt_rows(
    path: Path,
    tokenizer: AFMTokenizer,
    config: GenerateConfig,
    *,
    question: Mapping[str, Any] | None = None,
    data_format: str = "auto",
    fields: Sequence[tuple[str, str]] = (),
) -> list[PromptRow]:
    """The prompts of a file: conversations without their last answer, if they end with one.

    Args:
        path: records of any data format of training data (`mlx_afm.data`), in any form of file; or objects that
            have a "prompt" or an "instruction" alone.
        tokenizer: the model's; its `system_prompt` is that of conversations without a system message.
        config: how to answer.
        question: keys that the last message of the user gets, unless it has them.
        data_format, fields: see `mlx_afm.data.data_formats.read_record`.

    Raises:
        DataError: lines that are no prompts or leave no room for an answer: all of them.
        FormatError: no such file.
    """
    rows: list[PromptRow] = []
    faults = [f"{path}: {fault}" for fault in file_faults(path)]
    for row in iter_rows(path):
        try:
            messages, tools = _prompt(row, data_format, fields)
            if question and messages[-1].get("role") == "user":
                messages[-1] = {**question, **messages[-1]}
            ids = to_prompt_ids(tokenizer, messages, tools=tools)
            config.answer_tokens(len(ids))
            rows.append(PromptRow(row.line, Request(ids=ids, config=seeded(config, len(rows)))))
        except (DataError, ConfigError) as error:
            faults.append(f"{path} line {row.line}: {error}")
    if faults:
        advice = "Nothing was answered; correct the lines and start again."
        raise DataError("lines that are no prompts", where=path, advice=advice, details=shorten(faults))
    if not rows:
        raise DataError("no prompts", where=path, expected="at least one record")
    return rows


def _prompt(row: DataRow, data_format: str, fields: Sequence[tuple[str, str]]) -> tuple[list[Any], Any]:
    """Messages without the last answer, and tools; the messages are dicts and have yet to be checked."""
    if row.fault is not None:
        raise row.fault
    try:
        value = parse_json(row.text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error) from error
    if isinstance(value, dict):
        value = {**value, **_awaited(value, fields)}
    conversation = read_record(value, data_format, fields, in_table=row.in_table)
    if conversation.text is not None:
        raise DataError("plain text asks for no answer", expected="a conversation")
    messages = conversation.messages
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise DataError("no messages", expected="a list of messages", found=type(messages).__name__)
    answered = bool(messages) and messages[-1].get("role") == "assistant"
    asked = list(messages[:-1] if answered else messages)
    if not asked:
        raise DataError("nothing to answer", expected="a message of the user")
    return asked, conversation.tools or None


def _awaited(record: Mapping[str, Any], fields: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Empty answers for a record that has a question alone, under its own names or those that `fields` gives it."""
    columns = {name: column for name, column in fields if column in record}
    for question, answers in (("prompt", ANSWERS), ("instruction", ("output",))):
        if record.get(columns.get(question, question)) is not None:
            waiting = [columns.get(name, name) for name in answers]
            return {} if any(record.get(name) is not None for name in waiting) else dict.fromkeys(waiting, "")
    return {}


def run_of(request: Request, fingerprint: str) -> str:
    """A digest of a prompt and of all that its answer depends on: model, adapter and settings."""
    settings = {name: value for name, value in asdict(request.config).items() if name not in FREE}
    text = json.dumps([fingerprint, settings, list(request.ids)])
    return sha256(text.encode()).hexdigest()[:16]


class AnswerFile:
    """A file of answers, see the module's docstring.

    Args:
        path: of the finished file.
        rows: the prompts.
        fingerprint: of model and adapter, and of what else all answers depend on.

    Attributes:
        done: finished answers, lines by the number of the prompt; those of an earlier run among them.

    Raises:
        ConfigError: there are answers of another run.
        FormatError: what is there is no file of answers.
    """

    def __init__(self, path: Path, rows: Sequence[PromptRow], fingerprint: str) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self._lines = [row.line for row in rows]
        self._runs = [run_of(row.request, fingerprint) for row in rows]
        numbers = {line: number for number, line in enumerate(self._lines)}
        self.done: dict[int, dict[str, Any]] = {}
        others = []
        for file in (self.path, self.part):
            for found in _lines_of(file, cut=file == self.part):
                number = numbers.get(found["line"])
                if number is None or found.get("run") != self._runs[number]:
                    others.append(f"{file} has line {found['line']}")
                else:
                    self.done[number] = found
        if others:
            raise ConfigError(
                "answers of another run: other prompts, settings, model or adapter",
                where=path,
                advice="Name another output, or remove these files.",
                details=shorten(others),
            )
        self._handle: BinaryIO | None = None

    def __enter__(self) -> AnswerFile:
        self.part.parent.mkdir(parents=True, exist_ok=True)
        if len(self.done) < len(self._runs):
            self._handle = self.part.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def add(self, number: int, answer: Answer) -> None:
        """Keeps a finished answer; a process that is killed afterwards has not worked in vain."""
        self.done[number] = {
            "line": self._lines[number],
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "generation_tokens": len(answer.tokens),
            "run": self._runs[number],
        }
        assert self._handle is not None
        self._handle.write(_as_line(self.done[number]))
        self._handle.flush()

    def finish(self) -> None:
        """Writes the file, when all answers are there."""
        if self._handle is None and self.path.exists() and not self.part.exists():
            return
        with atomic_file(self.path) as partial:
            partial.write_bytes(b"".join(_as_line(self.done[number]) for number in range(len(self._runs))))
        self.part.unlink(missing_ok=True)


def _as_line(value: dict[str, Any]) -> bytes:
    return to_json(value).encode("utf-8", "replace") + b"\n"


def _lines_of(path: Path, *, cut: bool) -> list[dict[str, Any]]:
    """The answers in a file; with `cut` its last line may be half a line, and is then taken off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if cut and len(whole) < len(data):
        with path.open("rb+") as handle:
            handle.truncate(len(whole))
        data = whole
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise FormatError(
                "not a file of answers", where=f"{path} line {number}", found=f"{error!s:.100}"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get("line"), int):
            raise FormatError("not a file of answers", where=f"{path} line {number}", expected='{"line": ..., ...}')
        found.append(value)
    return found
