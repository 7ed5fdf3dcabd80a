"""`mlx-afm check`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_afm.files import to_json

from .output import json_option
from .parameters import PATH, example, refuse_given

if TYPE_CHECKING:
    from mlx_afm.formats.fmadapter_report import PackageReport


def show_report(report: PackageReport, as_json: bool) -> None:
    """Prints a check's findings and verdict."""
    if as_json:
        click.echo(to_json(report.to_dict(), default=str))
        return
    for finding in report.findings:
        place = f" {finding.file}" if finding.file else ""
        cause = f" (follows from {finding.cause})" if finding.cause else ""
        click.echo(f"{finding.severity.upper()} {finding.rule}{place}: {finding.message}{cause}")
    if not report.ok:
        click.echo(f"{report.package}: INVALID, broken rules {' '.join(report.broken)}")
    elif report.fits_device:
        click.echo(f"{report.package}: OK")
    else:
        click.echo(f"{report.package}: OK as a file, but not for a device")


@click.command("check", epilog=example("mlx-afm check titles.fmadapter"))
@click.argument("package", metavar="PATH", type=PATH)
@click.option("--signature", help="Signature the base model must have, or its first digits.")
@click.option("--expect", type=PATH, help="Adapter of any form whose values the package must hold.")
@click.option("--model", type=PATH, help="Base model folder, for an --expect that needs it.")
@click.option("--toolkit", type=PATH, help="Toolkit folder that the draft files must come from.")
@click.option("--byte-exact", is_flag=True, help="Metadata that is not the toolkit's text fails.")
@click.option("--reduce-rank", is_flag=True, help="The package was exported so; see export.")
@click.option("--zero-untrained", is_flag=True, help="The package was exported so; see export.")
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Check a .fmadapter package; exit 3 lists every broken rule."""
    from mlx_afm.workflows.check import CheckConfig, check_package

    if options["expect"] is None:
        refuse_given(("model", "reduce_rank", "zero_untrained"), "without --expect")
    report = check_package(CheckConfig(**options))
    show_report(report, as_json)
    sys.exit(0 if report.ok else 3)
