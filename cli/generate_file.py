"""`mlx-afm generate` with a file of prompts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mlx_afm.data.config import DataConfig
from mlx_afm.files import to_path
from mlx_afm.generation import GenerateConfig
from mlx_afm.workflows.answer import Answered, AnswerJob, answer_file

from .output import note, show
from .progress import duration


def names_a_file(prompt: str) -> bool:
    """Whether a prompt is the name of a file of prompts, rather than a text that ends like one."""
    return prompt.endswith(".jsonl") and (to_path(prompt).is_file() or not any(map(str.isspace, prompt)))


def answer_prompts(
    prompts: Path,
    output: Path,
    batch_size: int,
    data_config: DataConfig,
    as_json: bool,
    *,
    model: Path,
    adapter_path: Path | None,
    system: str | None,
    config: GenerateConfig,
    response_format: Path | None,
    draft_model: Path | None,
    num_draft_tokens: int | None,
) -> None:
    """Answers the file and shows how far it is, a line a second on stderr."""
    job = AnswerJob(
        model=model,
        adapter_path=adapter_path,
        prompts=prompts,
        output=output,
        config=config,
        batch_size=batch_size,
        system=system,
        data_format=data_config.data_format,
        fields=data_config.fields,
        response_format=response_format,
        draft_model=draft_model,
        num_draft_tokens=num_draft_tokens,
    )
    shown = time.perf_counter()

    def tell(state: Answered) -> None:
        nonlocal shown
        if state.done < state.total and time.perf_counter() - shown < 1:
            return
        shown = time.perf_counter()
        left = duration(state.seconds / state.new * (state.total - state.done))
        note(f"{state.done}/{state.total} answers  {state.tokens / state.seconds:,.0f} tokens/s  ETA {left}")

    done = answer_file(job, tell, note)
    facts: dict[str, Any] = {"output": str(output), "answers": done.total, "new": done.new}
    facts["generation_tokens"] = done.tokens
    if done.speculation is not None:
        facts["speculation"] = done.speculation.summary()
    show(facts, as_json)
