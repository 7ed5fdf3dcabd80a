"""Answer every prompt of a file, and go on where a run was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_afm.errors import SettingError
from mlx_afm.files import set_paths
from mlx_afm.folders import OnNote, ignore_note, lock_folder
from mlx_afm.generation import GenerateConfig, iter_answers
from mlx_afm.generation.config import require_fitting
from mlx_afm.generation.engine import BATCH_SIZE
from mlx_afm.generation.guided import guided_processor, guided_when_asked
from mlx_afm.generation.jsonl import AnswerFile, PromptRow, read_prompt_rows
from mlx_afm.generation.prompt_cache import fingerprint
from mlx_afm.generation.speculation import Speculation
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.workflows.draft_model import load_draft
from mlx_afm.workflows.load import load_for_answers
from mlx_afm.workflows.response_format import ResponseFormat, read_response_format


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """What to answer, with what, and where the answers go.

    Attributes:
        model: MLX model folder, or the hub id of one.
        prompts: see `read_prompt_rows`.
        output: JSON lines, see `mlx_afm.generation.jsonl`.
        adapter_path: an adapter of any form.
        config: how to answer; prompt n, counted from 0, draws with seed + n.
        batch_size: answered at once.
        system: see `load_for_answers`.
        data_format, fields: see `read_prompt_rows`.
        response_format: JSON file of what every answer is to follow, see `read_response_format`.
        draft_model: MLX folder of a draft model, or the hub id of one; it proposes tokens to all prompts of a batch.
        num_draft_tokens: how many at a time; None adapts.
    """

    model: str | Path
    prompts: Path
    output: Path
    adapter_path: Path | None = None
    config: GenerateConfig = field(default_factory=GenerateConfig)
    batch_size: int = BATCH_SIZE
    system: str | None = None
    data_format: str = "auto"
    fields: tuple[tuple[str, str], ...] = ()
    response_format: Path | None = None
    draft_model: Path | None = None
    num_draft_tokens: int | None = 5

    def __post_init__(self) -> None:
        set_paths(self, "model", "prompts", "output", "adapter_path", "response_format", "draft_model")
        if self.batch_size < 1:
            raise SettingError("batch_size", expected="at least 1", found=self.batch_size)
        if self.output.absolute() == self.prompts.absolute():
            raise SettingError("the answers would take the place of the prompts", where=self.output)
        if self.output.is_dir():
            raise SettingError("a folder is in the place of the answers", where=self.output)


@dataclass(frozen=True)
class Answered:
    """How far a job is.

    Attributes:
        done: prompts answered, those of earlier runs included.
        total: prompts.
        new: answered by this run.
        tokens: of these answers.
        seconds: since the first prompt of this run was taken up.
        speculation: what came of a draft model, if there is one.
    """

    done: int
    total: int
    new: int
    tokens: int
    seconds: float
    speculation: Speculation | None = None


def answer_file(
    job: AnswerJob, on_answer: Callable[[Answered], None] | None = None, on_note: OnNote = ignore_note
) -> Answered:
    """Answers the prompts that have no answer yet and writes the file when all have one.

    Args:
        job: see there. Started again after it was stopped or killed, it goes on; finished answers stay.
        on_answer: told after each answer.
        on_note: told what the user should know first; see also `lock_folder`.

    Raises:
        DataError: lines that are no prompts. ConfigError: answers of another run are in the way, or another process
            writes them. FormatError, AdapterError: see `load`.
    """
    with lock_folder(job.output, what="file", on_note=on_note):
        return _answer_file(job, on_answer, on_note)


def _answer_file(job: AnswerJob, on_answer: Callable[[Answered], None] | None, on_note: OnNote) -> Answered:
    model, tokenizer = load_for_answers(job.model, job.adapter_path, job.system, on_note)
    require_fitting(job.config, model)
    wanted = None if job.response_format is None else read_response_format(job.response_format)
    rows = _rows(job, tokenizer, wanted)
    guide = "" if wanted is None else json.dumps(wanted.guide, sort_keys=True)
    started, tokens, new = time.perf_counter(), 0, 0
    speculation = None
    if job.draft_model is not None:
        speculation = load_draft(job.draft_model, model, tokenizer, job.num_draft_tokens)
    with AnswerFile(job.output, rows, fingerprint(model) + guide) as answers:
        left = [number for number in range(len(rows)) if number not in answers.done]
        requests = [rows[number].request for number in left]
        options: dict[str, Any] = {"batch_size": job.batch_size, "speculation": speculation}
        for place, answer in iter_answers(model, tokenizer, requests, **options):
            answers.add(left[place], answer)
            tokens, new = tokens + len(answer.tokens), new + 1
            if on_answer is not None:
                on_answer(Answered(len(answers.done), len(rows), new, tokens, time.perf_counter() - started))
        answers.finish()
    return Answered(len(rows), len(rows), new, tokens, time.perf_counter() - started, speculation)


def _rows(job: AnswerJob, tokenizer: AFMTokenizer, wanted: ResponseFormat | None) -> list[PromptRow]:
    """The prompts; with a response format the question says it, and a processor of its own keeps each answer to it."""
    question = None
    if wanted is not None:
        guided_processor(tokenizer, wanted.guide)  # what cannot be kept to is refused before the prompts are read
        question = wanted.message and {"response_format": wanted.message}
    rows = read_prompt_rows(
        job.prompts,
        tokenizer,
        job.config,
        question=question,
        data_format=job.data_format,
        fields=job.fields,
    )
    return rows if wanted is None else [row.guided(guided_when_asked(tokenizer, wanted.guide)) for row in rows]
