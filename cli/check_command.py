"""`mlx-afm check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import json_option

if TYPE_CHECKING:
    from mlx_afm.formats.fmadapter_report import Report


def show_report(report: Report, as_json: bool) -> None:
    """Prints a check's findings and verdict."""
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False, default=str))
        return
    for finding in report.findings:
        place = f" {finding.file}" if finding.file else ""
        click.echo(f"{finding.severity.upper()} {finding.rule}{place}: {finding.message}")
    if not report.ok:
        broken = sorted({finding.rule for finding in report.findings if finding.severity == "fail"})
        click.echo(f"{report.package}: INVALID, broken rules {' '.join(broken)}")
    elif report.fits_device:
        click.echo(f"{report.package}: OK")
    else:
        click.echo(f"{report.package}: OK as a file, but not for a device")


@click.command("check")
@click.argument("path", type=Path)
@click.option("--signature", help="Signature the base model must have, or its first digits.")
@json_option
def command(path: Path, signature: str | None, as_json: bool) -> None:
    """Check a .fmadapter package; exit 3 lists every broken rule."""
    from mlx_afm.errors import FormatError
    from mlx_afm.formats.fmadapter_check import check_fmadapter

    if not path.exists():
        raise FormatError("no such package", where=path, expected="a .fmadapter folder")
    report = check_fmadapter(path, signature=signature)
    show_report(report, as_json)
    sys.exit(0 if report.ok else 3)
