"""The whole line on the tiny model the package carries, as a user would walk it with Apple's toolkit.

toolkit folder -> convert -> look at a sample -> score -> train -> score -> fuse -> generate -> export -> check
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_afm.checkpoints.arrays import cast
from mlx_afm.checkpoints.names import Kind, TensorEntry, plan_names
from mlx_afm.checkpoints.toolkit import range_of_scale
from mlx_afm.data import Example, read_examples
from mlx_afm.errors import ConfigError
from mlx_afm.files import read_json, to_path, write_text
from mlx_afm.folders import is_empty, lock_folder
from mlx_afm.formats.safetensors_file import read_safetensors
from mlx_afm.formats.tensors import LazyTensor
from mlx_afm.formats.torch_file import write_torch
from mlx_afm.generation import generate
from mlx_afm.model import Model, parse_toolkit_config
from mlx_afm.runs.job import LoRAJob
from mlx_afm.text.template import render
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import EventHandler, TrainConfig
from mlx_afm.workflows.convert import convert
from mlx_afm.workflows.export import export_fmadapter
from mlx_afm.workflows.fuse import fuse
from mlx_afm.workflows.load import load
from mlx_afm.workflows.lora import train
from mlx_afm.workflows.plot import loss_curve_svg, read_runs

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"
TRAINING = TrainConfig(
    epochs=3, batch_size=16, learning_rate=3e-3, steps_per_report=10, steps_per_eval=50, save_every=50
)
ADAPTER_NAME = "demo_box"
MAX_ANSWER_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where everything is, and what it was worth. Exact match is a share of the held-out requests."""

    toolkit_folder: Path
    model_folder: Path
    data_folder: Path
    adapter_folder: Path
    fused_folder: Path
    package: Path
    loss_curve: Path
    exact_match_before: float
    exact_match_after: float
    exact_match_fused: float
    valid_loss: float | None
    sample_request: str
    sample_answer_before: str
    sample_answer_after: str
    package_ok: bool
    seconds: float


def run_demo(
    out: str | Path, *, on_step: Callable[[str], None] = lambda text: None, on_event: EventHandler = lambda event: None
) -> DemoResult:
    """Runs the demo into a folder.

    Args:
        out: must not exist yet, or be empty.
        on_step: told what comes next, and shown the sample.
        on_event: told of training progress.

    Raises:
        ConfigError: `out` is in the way, or another process writes it.
    """
    out = to_path(out)
    with lock_folder(out, on_note=on_step):
        if os.path.exists(out) and not is_empty(out):
            raise ConfigError("the output folder is not empty", where=out, advice="Choose another --out.")
        Path(os.path.realpath(out)).mkdir(parents=True, exist_ok=True)  # also what a link names
        return _run(out, on_step, on_event)


def _run(out: Path, on_step: Callable[[str], None], on_event: EventHandler) -> DemoResult:
    started = time.perf_counter()
    on_step("writing the tiny model as a toolkit folder, and the data")
    toolkit, data = write_toolkit_folder(out / "toolkit"), out / "data"
    shutil.copytree(ASSETS / "data", data)
    on_step("convert: toolkit folder to MLX folder")
    folder = convert(toolkit, out / "model").folder
    model, tokenizer = load(folder)
    assert tokenizer is not None, "the demo's model has a tokenizer"
    test = read_examples((data / "test.jsonl",), tokenizer.special_pieces)
    on_step("one training example as the model sees it, what is trained in «»:\n" + rendered_sample(test[0]))
    on_step(f"scoring {len(test)} held-out requests with the base model")
    before, answers_before = exact_match(model, tokenizer, test)
    on_step(f"exact match {before:.0%}; training an adapter")
    job = LoRAJob(model=folder, data=data, adapter_path=out / "adapter", train=TRAINING, name=ADAPTER_NAME, cache=None)
    trained = train(job, on_event=on_event)
    curve = out / "loss.svg"
    write_text(curve, loss_curve_svg(read_runs([job.adapter_path]), "Demo adapter: loss"))
    on_step("scoring again with the adapter")
    after, answers_after = exact_match(load(folder, job.adapter_path)[0], tokenizer, test)
    on_step(f"exact match {after:.0%}; fusing, and scoring the fused model")
    fused = fuse(folder, job.adapter_path, out / "fused").folder
    fused_match, _ = exact_match(load(fused)[0], tokenizer, test)
    on_step("export and check")
    package, report = export_fmadapter(job.adapter_path, ADAPTER_NAME, out)
    shown = next((i for i, answer in enumerate(answers_after) if answer != answers_before[i]), 0)
    return DemoResult(
        toolkit_folder=toolkit,
        model_folder=folder,
        data_folder=data,
        adapter_folder=job.adapter_path,
        fused_folder=fused,
        package=package,
        loss_curve=curve,
        exact_match_before=before,
        exact_match_after=after,
        exact_match_fused=fused_match,
        valid_loss=trained.best_loss,
        sample_request=_request(test[shown]),
        sample_answer_before=answers_before[shown],
        sample_answer_after=answers_after[shown],
        package_ok=report.ok,
        seconds=time.perf_counter() - started,
    )


def write_toolkit_folder(folder: str | Path) -> Path:
    """Writes the bundled model the way the toolkit ships its own: `.pt`, JSON, `tokenizer.model`.

    The adapter tensors are as the toolkit's: A normal with deviation 1 / sqrt(in), B zero.
    """
    folder = to_path(folder)
    folder.mkdir(parents=True)
    config = parse_toolkit_config(read_json(ASSETS / "base-model-config.json"), where=ASSETS)
    ours, rng = read_safetensors(ASSETS / "base-model.safetensors"), np.random.default_rng(0)
    state = {
        entry.toolkit: _toolkit_value(entry, ours, rng) for entry in plan_names(config) if entry.kind is not Kind.ALIAS
    }
    write_torch(folder / "base-model.pt", state, aliases={"output_transform.weight": "embedding.weight"})
    for name in ("base-model-config.json", "tokenizer.model"):
        shutil.copyfile(ASSETS / name, folder / name)
    return folder


def _toolkit_value(entry: TensorEntry, ours: Mapping[str, LazyTensor], rng: np.random.Generator) -> LazyTensor:
    if entry.kind is Kind.WEIGHT:
        return cast(ours[entry.ours], "float32")
    if entry.kind is Kind.RANGE:
        return LazyTensor.of(range_of_scale(ours[entry.ours].read_values()))
    if entry.kind is Kind.SAMPLES:
        return LazyTensor.of(np.array(1, np.int64))
    if entry.ours.endswith(".lora_b"):
        return LazyTensor.of(np.zeros(entry.shape, np.float32))
    values = rng.standard_normal(entry.shape) / np.sqrt(entry.shape[0])
    return LazyTensor.of(values.astype(np.float32))


def rendered_sample(example: Example) -> str:
    """An example as the template writes it, trained spans in «»."""
    return "".join(f"«{span.text}»" if span.trained else span.text for span in render(example.messages))


def exact_match(model: Model, tokenizer: AFMTokenizer, examples: list[Example]) -> tuple[float, list[str]]:
    """Share of examples whose greedy answer is exactly the wanted one, and the answers."""
    answers = []
    for example in examples:
        prompt: list[Mapping[str, Any]] = [
            {"role": message.role, "content": message.content} for message in example.messages[:-1]
        ]
        answers.append(generate(model, tokenizer, prompt, max_tokens=MAX_ANSWER_TOKENS).strip())
    right = sum(answer == example.messages[-1].content for answer, example in zip(answers, examples))
    return right / len(examples), answers


def _request(example: Example) -> str:
    return str(example.messages[-2].content)
