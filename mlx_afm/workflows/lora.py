"""Train a LoRA adapter: data checked, model loaded, adapter trained, best and last written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_afm.adapters.store import WEIGHTS
from mlx_afm.data import DataConfig, TokenTable, make_batch, read_tokens
from mlx_afm.data.sources import Files, find_unread, require_splits, unread_text
from mlx_afm.errors import ConfigError
from mlx_afm.files import to_optional_path, to_path
from mlx_afm.folders import lock_folder
from mlx_afm.formats.fmadapter import require_adapter_name
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.folder import BEST, find_saved_run, require_no_finished_run
from mlx_afm.runs.frozen import EpochData, frozen_below
from mlx_afm.runs.hooks import Run, notices, require_prompts
from mlx_afm.runs.job import LoRAJob
from mlx_afm.runs.lineage import BASE_SOURCE, START_SOURCE, adapter_fingerprint
from mlx_afm.runs.reports import require_reports
from mlx_afm.runs.start import start_adapter
from mlx_afm.runs.state import (
    RunFingerprint,
    SavedRun,
    fingerprint_of_data,
    require_same_run,
    run_fingerprint,
)
from mlx_afm.text.system_prompt import default_system_prompt, trained_system_prompts
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import (
    Callback,
    DataOrder,
    DataRead,
    Hooks,
    Notice,
    Ranks,
    StageProgress,
    TrainConfig,
    evaluate_data,
    join_ranks,
)
from mlx_afm.training import train as run_training
from mlx_afm.training.frozen import FrozenLayers, first_trained_layer
from mlx_afm.training.hooks import ignore, notes_of
from mlx_afm.training.step import BatchOf, Loss, batch_loss, next_token_loss
from mlx_afm.workflows.estimate import (
    as_event,
    layouts_of_data,
    machine_memory,
    plan_of_folder,
    require_memory,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run is about, instead of the next token's cross entropy.

    Attributes:
        load: makes what steps lower and what evaluations tell, once everything else was found to be right; it is given
            what the run reads, and a stack for what must be closed when it ends.
        sources: what decides it, by name: recorded with the adapter, and a run is not resumed with others.
        held_bytes: of memory that it holds all along.
        teacher: folder of a model whose final hidden states it needs, or None. Its tokenizer is used if the model that
            is trained has none.
        batch_of: makes the batch of some examples.
    """

    load: Callable[[EpochData, ExitStack], tuple[Loss, Loss]]
    sources: Mapping[str, str] = field(default_factory=dict)
    held_bytes: int = 0
    teacher: ModelFolder | None = None
    batch_of: BatchOf = make_batch


NEXT_TOKEN = Objective(load=lambda run, stack: (batch_loss, next_token_loss))


@dataclass(frozen=True)
class Trained:
    """Outcome of a run.

    Attributes:
        adapter_path: the last adapter.
        steps: optimizer steps done.
        best_loss: lowest validation loss, nats per token; None without validation data.
        interrupted: it was asked to stop before its end, and can be resumed.
        best_path: the adapter of `best_loss`; None without validation data.
        best_step: its step.
        last_loss: validation loss of the last adapter; None without validation data, or if the run was interrupted
            after its last evaluation.
    """

    adapter_path: Path
    steps: int
    best_loss: float | None
    interrupted: bool = False
    best_path: Path | None = None
    best_step: int = 0
    last_loss: float | None = None


@dataclass(frozen=True)
class Score:
    """Loss on held-out data: nats per trained token, and e to that."""

    loss: float
    perplexity: float
    tokens: int
    examples: int


def train(
    job: LoRAJob,
    on_event: Callback = ignore,
    should_stop: Callable[[], bool] = lambda: False,
    objective: Objective = NEXT_TOKEN,
) -> Trained:
    """Trains an adapter and writes it.

    Everything that can be wrong is found before training starts: name, configuration, every line of
    the data. Files, in `job.adapter_path`, each written atomically: `adapters.safetensors` (the last),
    `adapter_config.json`, `best/` (an adapter folder), `metrics.jsonl`, `training_state.safetensors`;
    see `run_folder` for what a crash can do to them (nothing that resuming does not mend).

    Started as one of several processes (`mlx.launch`), it trains together with the others, which must be given the
    same job: rank 0 writes, and `on_event` is called there alone.

    Args:
        job: what to do.
        on_event: told of progress.
        should_stop: asked between steps; if it says so the run is saved and ends, to be resumed later.
        objective: what to lower; see `recover`.

    Raises:
        ConfigError, FormatError, DataError, TensorsError: see `load`, `read_tokens` and `find_saved_run`; a finished
            run in the folder without `overwrite`, or another process that writes it.
        DiskFullError: too little disk; the last saved state is intact.
        MissingDependencyError: a report whose library is not installed.
        DistributedError: another process of the run was lost; the steps done are saved.
    """
    ranks = join_ranks(job.train.rank_timeout_seconds)
    if not ranks.is_main_process:
        on_event = ignore
    if job.name is not None:
        require_adapter_name(job.name)
    require_reports(job.report_to)
    start = job.resume_adapter_file
    if start is not None and start.name == WEIGHTS:
        start = start.parent  # mlx-lm names the file
    folder = ModelFolder(job.model)
    job = replace(job, model=folder.path, resume_adapter_file=start, train=_decayed(job))
    _require_folder(job.adapter_path)
    with ExitStack() as stack:
        if ranks.is_main_process:
            stack.enter_context(lock_folder(job.adapter_path, BEST, on_note=notes_of(on_event)))
        return _train(job, folder, ranks, on_event, should_stop, objective)


def _train(
    job: LoRAJob,
    folder: ModelFolder,
    ranks: Ranks,
    on_event: Callback,
    should_stop: Callable[[], bool],
    objective: Objective,
) -> Trained:
    """Trains in a folder that is locked, with settings that are checked by themselves."""
    tokenizer = folder.tokenizer or (objective.teacher or folder).require_tokenizer()
    require_prompts(job, tokenizer)
    if not (job.resume or job.overwrite):
        require_no_finished_run(job.adapter_path)
    saved = find_saved_run(job.adapter_path) if job.resume else None
    data = _read_data(job, tokenizer, on_event)
    order = DataOrder(data["train"], job.train)
    total_steps = order.total_steps
    epoch = _epoch_data(job, data, order, tokenizer, on_event).with_plans(folder, objective.teacher, saved, ranks)
    fingerprint = _fingerprint(job, folder, data, objective, epoch)
    if saved is not None:
        require_same_run(saved, fingerprint, job.train, total_steps, where=job.adapter_path)
    ranks.require_same(_facts(fingerprint, total_steps, saved))
    for text in notices(job, saved, total_steps):
        on_event(Notice(text=text))
    snapshot, valid = None if saved is None else saved.snapshot, data.get("valid", ())
    with ExitStack() as stack:
        below = stack.enter_context(frozen_below(epoch, folder, fingerprint["from"]))
        lowest = 0 if below is None else below.layer
        _state_memory(job, folder, data["train"], objective.held_bytes, on_event, below)
        model = folder.load_model(layers=range(lowest, folder.config.num_layers) if lowest else None)
        form = start_adapter(
            model,
            folder,
            job.lora,
            seed=job.train.seed,
            adapter_file=job.resume_adapter_file,
            on_event=on_event if saved is None else ignore,  # a resumed run has its own values
        )
        assert first_trained_layer(model) >= lowest, "what is frozen gets no gradient"
        hooks = Hooks(should_stop=should_stop)
        if ranks.is_main_process:
            system_prompts = trained_system_prompts((example.ids for example in data["train"]), tokenizer)
            tokenizer.system_prompt = default_system_prompt(system_prompts)  # of the sample prompts
            run = Run(job, folder, model, tokenizer, form, fingerprint, total_steps, system_prompts)
            hooks = replace(stack.enter_context(run.hooks(saved, on_event)), should_stop=should_stop)
        loss_of, score_of = objective.load(epoch, stack)
        state = run_training(
            model,
            data["train"],
            valid,
            job.train,
            hooks,
            resume=snapshot,
            ranks=ranks,
            loss_of=loss_of,
            score_of=score_of,
            batch_of=objective.batch_of if below is None else below.make_batch,
        )
    ranks.wait()  # until rank 0 has written all there is: a launcher ends the others when the first has ended
    return Trained(
        job.adapter_path,
        state.step,
        state.best_loss,
        state.interrupted,
        best_path=None if state.best_loss is None else job.adapter_path / BEST,
        best_step=state.best_step,
        last_loss=state.loss_of_last,
    )


def _epoch_data(
    job: LoRAJob, data: Mapping[str, TokenTable], order: DataOrder, tokenizer: AFMTokenizer, on_event: Callback
) -> EpochData:
    return EpochData(
        job=job,
        splits=tuple(data[name] for name in ("train", "valid") if name in data),
        epochs=order.total_steps * job.train.grad_accumulation_steps / len(order.epoch(0)),
        prefix_end_id=tokenizer.turn_end_id,
        on_event=on_event,
    )


def _decayed(job: LoRAJob) -> TrainConfig:
    """The settings, without decay of the scales that qat trains: they say how large codes are, not how complex."""
    if job.lora.fine_tune_type != "qat":
        return job.train
    return replace(job.train, no_decay=(*job.train.no_decay, ".scales"))


def _state_memory(
    job: LoRAJob,
    folder: ModelFolder,
    data: TokenTable,
    held_bytes: int,
    on_event: Callback,
    below: FrozenLayers | None,
) -> None:
    """Tells the estimated peak memory; layers whose activations are all there are not loaded.

    Raises:
        ConfigError: it is above this machine's memory, and the job does not say to ignore that.
    """
    unloaded = 0 if below is None or below.store is None or below.missing else below.layer
    plan = plan_of_folder(folder, job.lora, job.train, layouts_of_data(data, job.train), unloaded_layers=unloaded)
    told, memory = as_event(plan.estimate()), machine_memory()
    on_event(replace(told, peak_bytes=told.peak_bytes + held_bytes, weights_bytes=told.weights_bytes + held_bytes))
    if not job.ignore_memory:
        require_memory(plan, None if memory is None else max(0, memory - held_bytes))


def _fingerprint(
    job: LoRAJob, folder: ModelFolder, data: Mapping[str, TokenTable], objective: Objective, epoch: EpochData
) -> RunFingerprint:
    """What decides where the run goes; see `state.py`."""
    read = {name: table for name, table in data.items() if name != "test"}
    sources = {**fingerprint_of_data(read), BASE_SOURCE: folder.fingerprint, **objective.sources, **epoch.sources}
    if job.resume_adapter_file is not None:
        sources[START_SOURCE] = adapter_fingerprint(job.resume_adapter_file)
    return run_fingerprint(job.train, job.lora, sources)


def _facts(fingerprint: RunFingerprint, total_steps: int, saved: SavedRun | None) -> dict[str, Any]:
    """What all processes of a run must have in common."""
    state = None if saved is None else saved.snapshot.values()
    return {**fingerprint, "number of steps": total_steps, "saved state": state, "version of MLX": mx.__version__}  # type: ignore[attr-defined]


def score(
    model_path: str | Path,
    adapter_path: str | Path | None,
    data: str | Path,
    *,
    batch_size: int = 4,
    data_config: DataConfig | None = None,
    cache: str | Path | None = None,
    own_system_prompt: bool = False,
    on_event: Callback = ignore,
) -> Score:
    """Loss of a model with an adapter on the test split of `data` (or on `data` itself if it is a file).

    Args:
        model_path: MLX model folder, or the hub id of one.
        adapter_path: an adapter of any form, or None.
        data: a folder, or one file.
        batch_size: examples at once.
        data_config: how to read the data.
        cache: folder that keeps encoded data; None keeps nothing.
        own_system_prompt: conversations without a system message get the system prompt that `load` finds, in place
            of the one of `data_config`; always so without `data_config`.
        on_event: is given the progress, in batches.
    """
    adapter_path = to_optional_path(adapter_path)
    data = to_path(data)
    cache = to_optional_path(cache)
    folder = ModelFolder(model_path)
    tokenizer = folder.require_tokenizer()
    if data_config is None or own_system_prompt:
        own = default_system_prompt(folder.system_prompts_at(adapter_path))
        data_config = replace(data_config or DataConfig(), system=own)
    examples = read_tokens(split_files(data, "test"), tokenizer, data_config, cache=cache)
    adapter = None if adapter_path is None else folder.open_adapter(adapter_path)
    model = folder.load_with(adapter, where=adapter_path)

    def tell(done: int, count: int) -> None:
        on_event(StageProgress(stage="scoring", done=done, total=count, unit="batches"))

    total, tokens = evaluate_data(model, examples, batch_size, on_batches=tell)
    loss = total / tokens
    return Score(loss, math.exp(loss), round(tokens), len(examples))


def require_valid_split(data: Path) -> None:
    """Checks that a run will have a best adapter.

    Raises:
        ConfigError: there is no validation data. FormatError: no data.
    """
    if "valid" not in require_splits(data):
        advice = "Add valid.jsonl, or leave --best out."
        raise ConfigError("a run without validation data has no best adapter", where=data, advice=advice)


def split_files(data: str | Path, split: str) -> Files:
    """The files of a split; data itself if it is a file.

    Raises:
        FormatError: there are none.
    """
    data = to_path(data)
    return require_splits(data)["train"] if data.is_file() else require_splits(data, split)[split]


def _read_data(job: LoRAJob, tokenizer: AFMTokenizer, on_event: Callback) -> dict[str, TokenTable]:
    """The splits that the run will read, each checked and announced."""
    there = require_splits(job.data, "train")
    if unread := find_unread(job.data, there):
        on_event(Notice(text=f"{job.data}: {unread_text(unread)}"))
    if "valid" not in there and (unused := _settings_of_validation(job)):
        on_event(Notice(text=f"{job.data}: no effect without validation data: {', '.join(unused)}"))
    wanted = ("train", *(("valid",) if "valid" in there else ()), *(("test",) if job.test else ()))
    data = {}
    for split in wanted:
        data[split] = table = read_split(job, tokenizer, split)
        on_event(
            DataRead(
                split=split,
                examples=len(table),
                tokens=len(table.ids),
                trained_tokens=int(table.trained.sum()),
                dropped_examples=table.dropped,
                removed_tokens=table.removed_tokens,
            )
        )
    return data


def _settings_of_validation(job: LoRAJob) -> list[str]:
    """Settings of the run, other than the default ones, that only validation reads."""
    names = ["val_batches", "patience", *([] if job.sample_prompts else ["steps_per_eval"])]
    default = TrainConfig()
    return [name for name in names if getattr(job.train, name) != getattr(default, name)]


def read_split(job: LoRAJob, tokenizer: AFMTokenizer, split: str) -> TokenTable:
    """The encoded examples of a split, every record checked."""
    return read_tokens(split_files(job.data, split), tokenizer, job.data_config, cache=job.cache)


def _require_folder(path: Path) -> None:
    if path.suffix in (".pt", ".fmadapter") or (path.exists() and not path.is_dir()):
        advice = "Choose another --adapter-path; .pt and .fmadapter are made from the folder: mlx-afm adapter convert"
        raise ConfigError(
            "cannot train into this", where=path, expected="a folder, new or of an earlier run", advice=advice
        )
