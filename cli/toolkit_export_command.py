"""`mlx-afm toolkit export_fmadapter`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlx_afm.files import to_json

from .check_command import show_report
from .output import json_option, note
from .parameters import PATH, example, refuse_given
from .toolkit_options import assets_option


@click.command(
    "export_fmadapter",
    epilog=example("mlx-afm toolkit export_fmadapter -n titles -c my.pt -o out"),
)
@click.option("-o", "--output-dir", type=PATH, required=True, help="Where NAME.fmadapter goes.")
@click.option("-n", "--adapter-name", required=True, help="Letters, digits, underscores.")
@click.option("-c", "--checkpoint", type=PATH, required=True, help="Adapter; a .pt, or another form.")
@click.option("-d", "--draft-checkpoint", type=PATH, help="Draft .pt: the package gets the draft pair.")
@click.option("--author", default="3P developer", show_default=True, help="Free text.")
@click.option("--description", default="", help="Free text.")
@click.option("-v", "--verbose", count=True, help="Say what was done to the adapter.")
@click.option("-q", "--quiet", count=True, help="Say nothing but what is wrong.")
@assets_option
@json_option
def command(
    output_dir: Path,
    adapter_name: str,
    checkpoint: Path,
    draft_checkpoint: Path | None,
    author: str,
    description: str,
    verbose: int,
    quiet: int,
    assets: Path | None,
    as_json: bool,
) -> None:
    """Write NAME.fmadapter, and check it."""
    from mlx_afm.workflows.export import ExportConfig
    from mlx_afm.workflows.toolkit_export import export_checkpoint

    if verbose:
        refuse_given(("quiet",), "with --verbose")
    config = ExportConfig(
        adapter=checkpoint,
        name=adapter_name,
        output_dir=output_dir,
        author=author,
        description=description,
        compare=False,
    )
    say = (lambda text: None) if quiet else note
    exported = export_checkpoint(config, assets, draft_checkpoint=draft_checkpoint, on_note=say)
    if verbose:
        for text in exported.notes():
            say(text)
    if as_json:
        click.echo(to_json(exported.to_dict()))
    elif not quiet or not exported.report.ok:
        show_report(exported.report, False)
    sys.exit(0 if exported.report.ok else 3)
