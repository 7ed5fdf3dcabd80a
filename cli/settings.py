"""Defaults < YAML file < flags, merged once into a `LoRAJob`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_afm.adapters import LoRAConfig
from mlx_afm.adapters.config import WHOLE_WEIGHTS
from mlx_afm.errors import SettingError
from mlx_afm.runs.job import LoRAJob
from mlx_afm.training import TrainConfig
from mlx_afm.training.config import OPTIMIZERS

from .data_options import data_config_from
from .settings_file import LORA_KEYS, SWITCHES, TRAIN_KEYS, read_settings

JOB_DEFAULTS = ("sample_tokens", "report_to", "project_name", "ignore_memory", "frozen_cache")
EXCLUSIVE = (("alpha", "scale"), ("layers", "num_layers"), ("iters", "epochs"))
SAME = (*EXCLUSIVE, ("system_prompt", "no_system_prompt"))  # two ways to say it
LOW_RANK_KEYS = ("rank", "scale", "alpha", "use_rslora", "dropout", "loraplus_ratio")
NEEDS = {"sample_tokens": "sample_prompt", "project_name": "report_to"}
LISTS = ("targets", "no_decay", "report_to")


@dataclass(frozen=True)
class LoraRequest:
    """What `mlx-afm lora` is asked to do: train (--resume asks for it too), test or both.

    `adapter_given` says whether there was an adapter path, `system_given` whether there was a system prompt, `best`
    whether to test the best adapter of the run.
    """

    job: LoRAJob
    train: bool
    test: bool
    adapter_given: bool
    system_given: bool
    best: bool


def request_from(
    file: Path | None,
    flags: Mapping[str, Any],
    required: tuple[str, ...] = ("model", "data"),
) -> LoraRequest:
    """What file and flags ask for together.

    Args:
        file: YAML.
        flags: of the command line.
        required: what must be given; a path that is not given is the empty one.

    Raises:
        ConfigError: a file that cannot be read or keys we do not know. UsageError: no model or no data.
    """
    values = {} if file is None else read_settings(file)
    switches = {name: bool(values.pop(name, False) or flags.get(name)) for name in SWITCHES}
    given = {name: value for name, value in flags.items() if value not in (None, ()) and name not in SWITCHES}
    for one, other in [pair for ways in SAME for pair in (ways, ways[::-1])]:
        if one in given and other not in given:
            values.pop(other, None)  # a flag wins over the other way of saying it in the file
    values |= given
    missing = [f"--{name}" for name in required if not values.get(name)]
    if missing:
        raise click.UsageError(f"missing {' and '.join(missing)}")
    _resolve(values)
    job = LoRAJob(
        model=values.get("model", Path()),
        data=values.get("data", Path()),
        adapter_path=values.get("adapter_path", "adapters"),
        lora=LoRAConfig(**{name: values[name] for name in LORA_KEYS & values.keys()}),
        train=TrainConfig(**{name: values[name] for name in TRAIN_KEYS & values.keys()}),
        name=values.get("name"),
        test=switches["test"],
        resume=switches["resume"],
        overwrite=switches["overwrite"] and not (flags.get("resume") and not flags.get("overwrite")),
        resume_adapter_file=values.get("resume_adapter_file"),
        sample_prompts=tuple(values.get("sample_prompt", ())),
        data_config=data_config_from(values),
        **_given(values),
    )
    system_given = values.get("system_prompt") is not None or bool(values.get("no_system_prompt"))
    trains = switches["train"] or switches["resume"]
    return LoraRequest(job, trains, switches["test"], "adapter_path" in values, system_given, switches["best"])


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the job itself that have defaults there."""
    given = {name: values[name] for name in JOB_DEFAULTS if name in values}
    return {**given, "cache": None} if values.get("no_cache") else given


def _resolve(values: dict[str, Any]) -> None:
    """Lists out of text, and what can be said in two ways said in one; in place.

    Raises:
        ConfigError: both ways at once.
    """
    for one, other in EXCLUSIVE:
        if one in values and other in values:
            raise SettingError(f"{one} and {other} exclude each other", expected="one of them", found="both")
    if "loraplus_ratio" in values and "lora_b" in values.get("rate_factors", {}):
        raise SettingError("loraplus_ratio and rate_factors.lora_b exclude each other", found="both")
    kind = values.get("fine_tune_type")
    if kind in WHOLE_WEIGHTS and (unused := [name for name in LOW_RANK_KEYS if name in values]):
        details = [f"{name}: only lora and dora have it" for name in unused]
        raise SettingError(f"settings without effect when fine_tune_type is {kind}", details=details)
    for name, needed in NEEDS.items():
        if name in values and not values.get(needed):
            raise SettingError(f"{name} has no effect without {needed}", advice=f"Give {needed}, or leave {name} out.")
    for name in LISTS:
        if isinstance(values.get(name), str):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    for name in ("sample_prompt", "field"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    values |= {name: tuple(values[name]) for name in (*LISTS, "sample_prompt") if name in values}
    if (count := values.pop("num_layers", None)) is not None:
        if count != -1 and count < 1:
            raise SettingError("num_layers out of range", expected="at least 1, or -1 for all", found=count)
        values["layers"] = "all" if count == -1 else f"last-{count}"
    if (ratio := values.pop("loraplus_ratio", None)) is not None:
        values["rate_factors"] = {**values.get("rate_factors", {}), "lora_b": ratio}
    own = values.get("optimizer_config", {})
    if own and set(own) <= set(OPTIMIZERS):  # mlx-lm has the settings of each optimizer by its name
        chosen = values.get("optimizer", TrainConfig().optimizer)
        own = {} if own.get(chosen) is None else own[chosen]
        if not isinstance(own, dict):
            raise SettingError("not a mapping of settings", where=f"optimizer_config, {chosen}", found=own)
        values["optimizer_config"] = own
