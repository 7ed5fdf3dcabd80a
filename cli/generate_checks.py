"""Which options of `mlx-afm generate` go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .output import note
from .parameters import is_given, refuse_given

OF_ONE_PROMPT = ("prompt_cache_file", "transform", "verbose")
OF_A_FILE = ("output", "batch_size", "data_format", "field", "transform")
SAMPLING = ("top_p", "top_k", "min_p", "seed")


def require_sense(of_file: bool, options: Mapping[str, Any]) -> None:
    """Refuses options that do not go together; the error names every model or file that is not there, too.

    Raises:
        UsageError: options without effect.
    """
    try:
        if of_file and not is_given("output"):
            raise click.UsageError("a --prompt that names a .jsonl needs --output")
        if of_file:
            refuse_given(OF_ONE_PROMPT, "with a --prompt that names a .jsonl")
        else:
            refuse_given(OF_A_FILE, "without a --prompt that names a .jsonl")
        if options["draft_model"] is None:
            refuse_given(("num_draft_tokens",), "without --draft-model")
    except click.UsageError as error:
        missing = [f"--{name.replace('_', '-')}: no such file or folder: {options[name]}" for name in _missing(options)]
        raise click.UsageError("\n".join([error.message, *missing])) from None
    if options["config"].temp == 0 and (unused := [f"--{n.replace('_', '-')}" for n in SAMPLING if is_given(n)]):
        note(f"{', '.join(unused)}: no effect with --temp 0, which takes the most likely token")


def _missing(options: Mapping[str, Any]) -> list[str]:
    """Names of the options whose path is not there; a hub id is no path."""
    from mlx_afm.checkpoints.hub import REPOSITORY

    paths = {name: options[name] for name in ("model", "adapter_path", "draft_model", "response_format")}
    return [
        name
        for name, path in paths.items()
        if path is not None and not (path.exists() or REPOSITORY.fullmatch(str(path)))
    ]
