"""`mlx-afm estimate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_afm.files import format_bytes

from .lora_options import ESTIMATED
from .output import json_option, note, show
from .parameters import PATH, SIZE, example, refuse_given
from .settings import LoraRequest, request_from

TABLE_SETS = ("batch_size", "batch_tokens", "max_seq_length", "grad_checkpoint")


def _with_options(function: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(ESTIMATED):
        function = option(function)
    return function


@click.command("estimate", epilog=example("mlx-afm estimate --model afm-mlx --data my-data --batch-size 2"))
@click.option("--model", type=PATH, help="MLX model folder.  [default: the 3.18 B parameter model]")
@click.option("--data", type=PATH, help="Training data, whose lengths are used.")
@click.option("--base", help="Assume these base weights: float32, bfloat16, 8-bit, 4-bit or 2-bit.")
@click.option(
    "--trained-share",
    type=click.FloatRange(0, 1),
    help="Share of tokens that are trained, without --data.  [default: 0.25]",
)
@click.option("--memory", type=SIZE, help="Memory of the machine, such as 16GB.  [default: this one's]")
@click.option("--table", is_flag=True, help="Largest batches for 8 to 64 GB.")
@_with_options
@json_option
def command(
    config: Path | None,
    base: str | None,
    trained_share: float | None,
    memory: int | None,
    table: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Estimate the memory of training before anything is loaded, and show which settings fit.

    Takes the options of `lora`; those that do not change memory are only checked. Without --data every example is
    taken to be as long as --max-seq-length.
    """
    from mlx_afm.workflows import estimate

    if table:
        reason = "with --table, which has lengths, batches, forms of the base and memories of its own"
        refuse_given(("data", "base", "trained_share", "memory", *TABLE_SETS), reason)
    if flags["data"] is not None:
        refuse_given(("trained_share",), "with --data, whose real share is taken")
    request = request_from(config, flags, required=())
    plan = _plan(request, base, trained_share)
    if memory is not None:
        plan = replace(plan, backend="gpu")  # a Mac is meant
    if table:
        rows = estimate.settings_table(plan)
        show({"table": rows}, True) if as_json else click.echo(estimate.as_markdown(rows))
        return 0
    result, limit = estimate.report(plan, memory or estimate.machine_memory(), mac=memory is not None)
    ways = result.pop("ways_to_fit")
    show({**result, "ways_to_fit": ways}, as_json) if as_json else show(result, False)
    if limit is not None and not as_json:
        for way, size in ways.items():
            note(f"fits: {way}: {format_bytes(size)}")
    return 0


def _plan(request: LoraRequest, base: str | None, share: float | None) -> Any:
    """The run that is asked about."""
    from mlx_afm.model import AFMConfig
    from mlx_afm.model_folder import ModelFolder
    from mlx_afm.runs.frozen import lowest_trained_layer, stored_bytes
    from mlx_afm.workflows import estimate
    from mlx_afm.workflows.lora import read_split

    job = request.job
    has_model, has_data = job.model != Path(), job.data != Path()
    if has_data and not has_model:
        raise click.UsageError("--data needs --model: its tokenizer")
    folder, stored = ModelFolder(job.model) if has_model else None, 0
    if has_data and folder is not None:
        data = read_split(job, folder.require_tokenizer(), "train")
        layouts = estimate.layouts_of_data(data, job.train)
        layer = lowest_trained_layer(job.lora, folder.config)
        stored = stored_bytes(folder.config, layer, (data,), estimate.base_of(folder).dtype) if layer else 0
    else:
        share = estimate.TRAINED_SHARE if share is None else share
        layouts = (estimate.layout_by_settings(job.train, job.data_config.max_tokens, share),)
    model = AFMConfig() if folder is None else folder.config
    if base is not None or folder is None:
        held = estimate.named_base(base or "bfloat16", model)
    else:
        held = estimate.base_of(folder)
    return estimate.RunPlan(
        model=model,
        base=held,
        lora=job.lora,
        train=job.train,
        layouts=layouts,
        backend=estimate.backend(),
        stored_bytes=stored,
    )
