"""`mlx-afm data convert`."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.data.data_formats import DATA_FORMATS
from mlx_afm.workflows.rewrite_data import convert as convert_data

from .data_options import overwrite_option, record_options
from .output import json_option, note, show
from .parameters import PATH, example


@click.command("convert", epilog=example("mlx-afm data convert my-data toolkit-data --to toolkit"))
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--to", type=click.Choice(DATA_FORMATS), default="messages", show_default=True, help="Format to write.")
@click.option(
    "--columns",
    metavar="NAME,NAME",
    default="",
    help="Columns of a .csv or .tsv file without a line of names, such as prompt,completion.",
)
@overwrite_option
@record_options
@json_option
def convert(
    source: Path, target: Path, to: str, columns: str, overwrite: bool, data_config: DataConfig, as_json: bool
) -> None:
    """Write the data of SOURCE in another data format.

    SOURCE is a file of any form, and TARGET's suffix says what it becomes: .jsonl, .json, .csv or .tsv. Or
    SOURCE is a folder with train, valid and test files, and TARGET one too. What the data format cannot say is
    refused with its line, and nothing is written. --overwrite replaces a file, not a folder.
    """
    names = [name.strip() for name in columns.split(",")] if columns else []
    written = convert_data(source, target, to, data_config, names, overwrite=overwrite, on_note=note)
    show({"data_format": to, "records": sum(written.values()), "files": written}, as_json)
