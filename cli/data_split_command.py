"""`mlx-afm data split`."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.data.split import SplitConfig
from mlx_afm.workflows.rewrite_data import split as split_data

from .data_options import data_argument, overwrite_option, record_options
from .output import json_option, note, show
from .parameters import PATH, example


@click.command("split", epilog=example("mlx-afm data split all.jsonl --out my-data --valid 0.1"))
@data_argument
@click.option("--out", type=PATH, required=True, help="Folder for train.jsonl, valid.jsonl and test.jsonl.")
@click.option("--valid", type=float, default=SplitConfig.valid, show_default=True, help="Share to validate on.")
@click.option("--test", type=float, default=SplitConfig.test, show_default=True, help="Share to test on.")
@click.option("--seed", type=int, default=SplitConfig.seed, show_default=True, help="Which groups go where.")
@click.option(
    "--threshold",
    type=float,
    default=SplitConfig.threshold,
    show_default=True,
    help="How much two prompts have in common to stay together; 1 groups equal prompts alone.",
)
@overwrite_option
@record_options
@json_option
def split(
    data: Path,
    out: Path,
    valid: float,
    test: float,
    seed: int,
    threshold: float,
    overwrite: bool,
    data_config: DataConfig,
    as_json: bool,
) -> None:
    """Split a file so that no prompt, nor one that is nearly the same, is on two sides.

    Lines are written as they are, in their order.
    """
    config = SplitConfig(valid=valid, test=test, seed=seed, threshold=threshold)
    show(split_data(data, out, config, data_config, overwrite=overwrite, on_note=note).to_dict(), as_json)
