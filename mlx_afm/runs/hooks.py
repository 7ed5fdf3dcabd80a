"""What a training run tells and leaves behind: the callables that `training` is given, on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.config import to_adapter_json
from mlx_afm.checkpoints.names import DEFAULT_ADAPTER
from mlx_afm.data import find_splits
from mlx_afm.errors import ConfigError, DataError, SettingError
from mlx_afm.files import require_space, sha256_of
from mlx_afm.generation import GenerateConfig, generate, to_prompt_ids
from mlx_afm.model import Model
from mlx_afm.model_folder import ModelFolder
from mlx_afm.runs.folder import RunFolder, describe_replaced, missing_bytes
from mlx_afm.runs.job import LoRAJob
from mlx_afm.runs.lineage import SOURCES
from mlx_afm.runs.reports import open_reports
from mlx_afm.runs.state import RunFingerprint, SavedRun
from mlx_afm.text.system_prompt import SystemPrompts
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import Callback, Event, Hooks


@dataclass(frozen=True)
class Run:
    """A run about to start.

    Attributes:
        job: what was asked for.
        folder: the base model's.
        model: with the adapter to train.
        tokenizer: for samples.
        form: of the adapter.
        fingerprint, total_steps: see `state.py`.
        system_prompts: of the training data.
    """

    job: LoRAJob
    folder: ModelFolder
    model: Model
    tokenizer: AFMTokenizer
    form: LoRAConfig
    fingerprint: RunFingerprint
    total_steps: int
    system_prompts: SystemPrompts = ()

    @contextmanager
    def hooks(self, saved: SavedRun | None, on_event: Callback) -> Iterator[Hooks]:
        """Writes the run's folder, reports, and tells `on_event`, while it lasts.

        Raises:
            DiskFullError: not enough space.
        """
        job = self.job
        trained_bytes = sum(array.nbytes for _, array in tree_flatten(self.model.trainable_parameters()))
        require_space(job.adapter_path, missing_bytes(job.adapter_path, trained_bytes))
        settings = {
            **_settings(job, self.folder, self.model, self.form, self.system_prompts),
            SOURCES: self.fingerprint["from"],
        }
        with (
            RunFolder(job.adapter_path, self.model, settings, self.fingerprint, self.total_steps) as folder,
            open_reports(job.report_to, job.project_name, job.adapter_path, settings) as reports,
        ):
            if saved is not None:
                folder.go_on(saved)
            watchers = (folder.record, *reports, on_event)

            def tell(event: Event) -> None:
                for watch in watchers:
                    watch(event)

            sample = _sampler(self.model, self.tokenizer, job)
            yield Hooks(on_event=tell, save_state=folder.save_state, save=folder.save, sample=sample)


def require_prompts(job: LoRAJob, tokenizer: AFMTokenizer) -> None:
    """Checks that the sample prompts can be answered, before anything is written.

    Raises:
        SettingError: special tokens in a prompt, or a prompt that fills the context.
    """
    for number, prompt in enumerate(job.sample_prompts, 1):
        try:
            ids = to_prompt_ids(tokenizer, prompt)
            GenerateConfig(max_tokens=job.sample_tokens).answer_tokens(len(ids))
        except (ConfigError, DataError) as error:
            raise SettingError(f"sample_prompt {number} cannot be used: {error}") from error


def notices(job: LoRAJob, saved: SavedRun | None, total_steps: int) -> Iterator[str]:
    """What to say before the run begins, about one that is there."""
    if not job.resume:
        replaced = describe_replaced(job.adapter_path)
        if replaced:
            yield replaced
    elif saved is None:
        yield f"nothing to resume in {job.adapter_path}: starting anew"
    elif saved.step >= total_steps or 0 < job.train.patience <= saved.snapshot.state.evaluations_without_best:
        yield f"nothing left to do: the run in {job.adapter_path} is finished (step {saved.step})"


def _settings(
    job: LoRAJob, folder: ModelFolder, model: Model, form: LoRAConfig, system_prompts: SystemPrompts
) -> dict[str, Any]:
    """Content of `adapter_config.json`: the adapter's form, and how it was made."""
    adapter = folder.toolkit_config.adapter
    return {
        **to_adapter_json(form, model.args, adapter.name if adapter else DEFAULT_ADAPTER, system_prompts),
        "model": str(job.model),
        "data": _hashes(job.data),
        "trained_targets": list(job.lora.targets),
        "trained_layers": job.lora.layers,
        "train": asdict(job.train),
    }


def _hashes(data: Path) -> dict[str, list[str]]:
    """SHA-256 of the files of each split; folders have none."""
    return {name: [sha256_of(file) for file in files if file.is_file()] for name, files in find_splits(data).items()}


def _sampler(model: Model, tokenizer: AFMTokenizer, job: LoRAJob) -> Callable[[], Iterator[tuple[str, str]]] | None:
    """Gives (prompt, greedy answer) for each sample prompt; None if there are none."""

    def sample() -> Iterator[tuple[str, str]]:
        for prompt in job.sample_prompts:
            yield prompt, generate(model, tokenizer, prompt, max_tokens=job.sample_tokens)

    return sample if job.sample_prompts else None
