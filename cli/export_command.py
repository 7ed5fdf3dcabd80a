"""`mlx-afm export`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .check_command import show_report
from .output import json_option, note


@click.command("export")
@click.option("--adapter-path", type=Path, required=True, help="Adapter folder, .pt or .fmadapter.")
@click.option("--name", required=True, help="Letters, digits, underscores; devices refuse hyphens.")
@click.option("--output-dir", type=Path, default=Path("."), show_default=True, help="Where NAME.fmadapter goes.")
@click.option("--model", type=Path, help="Base model folder, for adapters that do not say what they were made for.")
@click.option("--author", help="Default: 3P developer, as the toolkit writes.")
@click.option("--description", help="Free text.")
@click.option("--license", "license_text", help="Free text.")
@click.option("--signature", help="40 hex digits of the base model; default: toolkit 26.0.0's.")
@json_option
def command(
    adapter_path: Path,
    name: str,
    output_dir: Path,
    model: Path | None,
    author: str | None,
    description: str | None,
    license_text: str | None,
    signature: str | None,
    as_json: bool,
) -> None:
    """Write an adapter as NAME.fmadapter for OS 26.x devices, and check it."""
    from mlx_afm.workflows.export import export_fmadapter

    given = {"author": author, "description": description, "license": license_text, "signature": signature}
    metadata = {key: value for key, value in given.items() if value is not None}
    package, report = export_fmadapter(adapter_path, name, output_dir, model_path=model, **metadata)
    if signature is None:
        note("Signature of toolkit 26.0.0: devices on OS 26.x whose base model has another one will refuse it.")
    note(f"wrote {package}")
    show_report(report, as_json)
    sys.exit(0 if report.ok else 3)
