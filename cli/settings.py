"""Defaults < YAML file < flags, merged once into a `LoRAJob`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlx_afm.adapters import LoRAConfig
from mlx_afm.errors import ConfigError
from mlx_afm.training import TrainConfig
from mlx_afm.workflows.lora import LoRAJob

LORA_KEYS = {field.name for field in fields(LoRAConfig)}
TRAIN_KEYS = {field.name for field in fields(TrainConfig)}
JOB_KEYS = {"model", "data", "adapter_path", "max_seq_length", "name"}
SWITCHES = {"train", "test"}
KNOWN = LORA_KEYS | TRAIN_KEYS | JOB_KEYS | SWITCHES | {"lora_parameters"}


def job_from(file: Path | None, flags: Mapping[str, Any]) -> tuple[LoRAJob, bool, bool]:
    """The job, and whether the file asks to train and to test.

    Raises:
        ConfigError: a file that cannot be read or keys we do not know. UsageError: no model or no data.
    """
    values = {} if file is None else read_settings(file)
    switches = [bool(values.pop(name, False)) for name in ("train", "test")]
    values |= {name: value for name, value in flags.items() if value is not None}
    missing = [f"--{name}" for name in ("model", "data") if not values.get(name)]
    if missing:
        raise click.UsageError(f"missing {' and '.join(missing)}")
    if isinstance(values.get("targets"), str):
        values["targets"] = tuple(part.strip() for part in values["targets"].split(",") if part.strip())
    if "targets" in values:
        values["targets"] = tuple(values["targets"])
    if values.get("iters") is not None and flags.get("epochs") is not None and flags.get("iters") is None:
        values["iters"] = None  # --epochs on the command line wins over iters in the file
    job = LoRAJob(
        model=Path(values["model"]),
        data=Path(values["data"]),
        adapter_path=Path(values.get("adapter_path", "adapters")),
        lora=LoRAConfig(**{name: values[name] for name in LORA_KEYS & values.keys()}),
        train=TrainConfig(**{name: values[name] for name in TRAIN_KEYS & values.keys()}),
        name=values.get("name"),
        **({"max_tokens": values["max_seq_length"]} if "max_seq_length" in values else {}),
    )
    return job, switches[0], switches[1]


def read_settings(file: Path) -> dict[str, Any]:
    """The options in a YAML file; mlx-lm's `lora_parameters` block is read too.

    Raises:
        ConfigError: not readable, not a mapping, or unknown keys, with the nearest known one.
    """
    import yaml

    if not file.is_file():
        raise ConfigError("no such file", where=file, expected="a YAML file of options")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}", where=file) from error
    if not isinstance(values, dict) or not isinstance(values.get("lora_parameters", {}), dict):
        raise ConfigError("not a mapping of options", where=file)
    values = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    values |= {str(name): value for name, value in values.pop("lora_parameters", {}).items()}
    unknown = [name for name in values if name not in KNOWN]
    if unknown:
        near = {name: difflib.get_close_matches(name, KNOWN, n=1) for name in unknown}
        details = [name + (f": is it {near[name][0]!r}?" if near[name] else "") for name in unknown]
        raise ConfigError("unknown options", where=file, details=details)
    return values
