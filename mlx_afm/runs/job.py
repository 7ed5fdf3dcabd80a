"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlx_afm.adapters import LoRAConfig
from mlx_afm.data import DataConfig, default_cache
from mlx_afm.errors import SettingError
from mlx_afm.files import parse_bytes, set_paths
from mlx_afm.training import TrainConfig

AUTO, OFF, RECOMPUTE = "auto", "off", "recompute"  # of `LoRAJob.frozen_cache`


def frozen_cache_fault(value: str) -> str | None:
    """What is wrong with a `LoRAJob.frozen_cache`, in words."""
    try:
        if value not in (AUTO, OFF, RECOMPUTE):
            parse_bytes(value)
    except SettingError:
        return f"frozen_cache: expected {AUTO}, {OFF}, {RECOMPUTE} or a size such as 20GB, found {value!r}"
    return None


@dataclass(frozen=True, kw_only=True)
class LoRAJob:
    """A training run. Paths may be given as str, with `~`; they are held as `Path`.

    Attributes:
        model: MLX model folder, or the hub id of one.
        data: a folder with train.jsonl and perhaps valid.jsonl and test.jsonl, or one file to train on.
        adapter_path: folder for the adapter and its records.
        lora: form of the adapter.
        train: how long and how fast.
        data_config: how the data becomes tokens.
        cache: folder that keeps encoded data; None keeps nothing.
        name: name of a package to be exported later; checked before training.
        test: the adapter will be scored on the test split afterwards, so that is checked first too.
        overwrite: replace a finished run, or an adapter of unknown origin, in `adapter_path`.
        resume: go on with the run in `adapter_path`; a folder without any run starts one.
        resume_adapter_file: an adapter of any form whose values training starts from; a new run.
        sample_prompts: answered after each evaluation.
        sample_tokens: longest answer.
        report_to: some of wandb, swanlab, tensorboard.
        project_name: the project of these reports.
        ignore_memory: train even if the estimated peak is above this machine's memory.
        frozen_cache: of the layers below the first trained one, what is done with their activations: `auto` keeps them
            in `cache` where that saves time, a size such as 20GB keeps so much, `recompute` computes the same in every
            step and keeps nothing, `off` computes these layers with the others.

    Raises:
        ConfigError: settings out of range, or that exclude each other; all in one error.
    """

    model: Path
    data: Path
    adapter_path: Path
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    cache: Path | None = field(default_factory=default_cache)
    name: str | None = None
    test: bool = False
    overwrite: bool = False
    resume: bool = False
    resume_adapter_file: Path | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    report_to: tuple[str, ...] = ()
    project_name: str = "mlx-afm"
    ignore_memory: bool = False
    frozen_cache: str = "auto"

    def __post_init__(self) -> None:
        set_paths(self, "model", "data", "adapter_path", "cache", "resume_adapter_file")
        faults = []
        if isinstance(self.sample_tokens, bool) or not isinstance(self.sample_tokens, int) or self.sample_tokens < 1:
            faults.append(f"sample_tokens: expected at least 1, found {self.sample_tokens!r}")
        if not all(isinstance(prompt, str) and prompt for prompt in self.sample_prompts):
            faults.append(f"sample_prompts: expected texts that are not empty, found {self.sample_prompts!r}")
        if (fault := frozen_cache_fault(self.frozen_cache)) is not None:
            faults.append(fault)
        if self.resume and self.overwrite:
            faults.append("overwrite: expected without resume, which continues the run that is there")
        if faults:
            raise SettingError("settings of the run out of range", details=faults)
