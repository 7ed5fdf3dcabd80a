"""Defaults < YAML file < flags, merged once into a `LoRAJob`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
# What a file may give for an option, by the type of its field.
KINDS = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((list, str), "a list of names, or names with commas between"),
}
TYPES = {
    **dict.fromkeys(JOB_KEYS, "str"),
    **dict.fromkeys(SWITCHES, "bool"),
    **{field.name: str(field.type).removesuffix(" | None") for field in (*fields(LoRAConfig), *fields(TrainConfig))},
    "max_seq_length": "int",
}


@dataclass(frozen=True)
class Request:
    """What `mlx-afm lora` is asked to do: train, test or both; and whether an adapter path was given."""

    job: LoRAJob
    train: bool
    test: bool
    adapter_given: bool


def request_from(file: Path | None, flags: Mapping[str, Any]) -> Request:
    """What file and flags ask for together.

    Raises:
        ConfigError: a file that cannot be read or keys we do not know. UsageError: no model or no data.
    """
    values = {} if file is None else read_settings(file)
    switches = {name: bool(values.pop(name, False) or flags.get(name)) for name in SWITCHES}
    values |= {name: value for name, value in flags.items() if value is not None and name not in SWITCHES}
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
        test=switches["test"],
        **({"max_tokens": values["max_seq_length"]} if "max_seq_length" in values else {}),
    )
    return Request(job, switches["train"], switches["test"], "adapter_path" in values)


def read_settings(file: Path) -> dict[str, Any]:
    """The options in a YAML file; mlx-lm's `lora_parameters` block is read too.

    Raises:
        ConfigError: not readable, not a mapping, unknown keys, with the nearest known one, or values of
            the wrong type.
    """
    import yaml

    if not file.is_file():
        raise ConfigError("no such file", where=file, expected="a YAML file of options")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, first = getattr(error, "problem_mark", None), str(error).splitlines()[0]
        where = file if mark is None else f"{file} line {mark.line + 1}"
        raise ConfigError(f"not YAML: {getattr(error, 'problem', None) or first}", where=where) from error
    if not isinstance(values, dict):
        raise ConfigError("not a mapping of options", where=file, expected="lines such as 'iters: 100'")
    values = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    block = values.pop("lora_parameters", {})
    if not isinstance(block, dict):
        raise ConfigError("lora_parameters is not a mapping", where=file, expected="rank, scale, dropout", found=block)
    values |= {str(name): value for name, value in block.items() if value is not None}
    unknown = [name for name in values if name not in KNOWN]
    if unknown:
        near = {name: difflib.get_close_matches(name, KNOWN, n=1) for name in unknown}
        details = [name + (f": is it {near[name][0]!r}?" if near[name] else "") for name in unknown]
        raise ConfigError("unknown options", where=file, details=details)
    values = {name: _number(value) if TYPES[name] == "float" else value for name, value in values.items()}
    wrong = [name for name, value in values.items() if not _fits(value, TYPES[name])]
    if wrong:
        details = [f"{name}: expected {KINDS[TYPES[name]][1]}, found {values[name]!r}" for name in wrong]
        raise ConfigError("options of the wrong type", where=file, details=details)
    return values


def _number(value: Any) -> Any:
    """Text such as 1e-3 as the number it is everywhere but in YAML 1.1, which wants 1.0e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind][0]) and (kind == "bool" or not isinstance(value, bool))
