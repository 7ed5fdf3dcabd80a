"""`mlx-afm data check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.data.fix import Fixed, LineChange
from mlx_afm.data.report import DataReport, Problem
from mlx_afm.data.sources import unread_text
from mlx_afm.files import to_json
from mlx_afm.workflows.check_data import check as check_data

from .data_options import data_argument, data_config_options
from .output import json_option, note
from .parameters import PATH, example
from .progress import BytesProgress

WATCHED_BYTES = 20_000_000  # less is done before anyone wonders
SHOWN = 20  # problems of one kind spelled out; --json has more


@click.command("check", epilog=example("mlx-afm data check my-data --model afm-mlx"))
@data_argument
@click.option("--model", type=PATH, help="Model folder, for its tokenizer; without it lengths are not checked.")
@data_config_options
@click.option("--fix", type=PATH, metavar="FOLDER", help="Write a copy without the problems, and say what changed.")
@json_option
def check(data: Path, model: Path | None, data_config: DataConfig, fix: Path | None, as_json: bool) -> None:
    """Check every line of training data: a folder with train, valid and test files, or one file.

    Exit code 3 if training would be wrong, also if --fix wrote a copy in which it is right.
    """
    with BytesProgress("checking") as progress:

        def handle(done: int, total: int) -> None:
            if total >= WATCHED_BYTES:
                progress.handle(done, total)

        report, fixed = check_data(data, data_config, model=model, fix=fix, on_progress=handle, on_note=note)
    if as_json:
        values: dict[str, Any] = {**report.to_dict(), **({} if fixed is None else {"fix": fixed.to_dict()})}
        click.echo(to_json(values))
    else:
        for line in [*_report_lines(report), *_verdict_lines(report), *([] if fixed is None else _fixed_lines(fixed))]:
            click.echo(line)
    if report.unread_files:
        note(f"{data}: {unread_text([Path(name) for name in report.unread_files])}.")
    if not report.lengths_checked:
        note("Lengths were not checked, nor special tokens that only the tokenizer knows: give --model.")
    sys.exit(0 if report.ok else 3)


def _report_lines(report: DataReport) -> Iterator[str]:
    for kind, problems in _by_kind(report.problems):
        count = report.counts[kind]
        yield f"{'ERROR' if problems[0].is_error else 'WARNING'} {kind}: {count:,}"
        yield from (f"  {problem}" for problem in problems[:SHOWN])
        if count > SHOWN:
            yield f"  ... and {count - SHOWN:,} more; --json lists {len(problems):,}"


def _by_kind(problems: tuple[Problem, ...]) -> list[tuple[str, list[Problem]]]:
    """Errors first; the problems of a kind stay in order."""
    ordered = sorted(problems, key=lambda problem: (not problem.is_error, problem.kind))
    return [(kind, list(group)) for kind, group in groupby(ordered, key=lambda problem: problem.kind)]


def _verdict_lines(report: DataReport) -> Iterator[str]:
    for file in report.files:
        tokens = f", {file.tokens:,} tokens, {file.trained_tokens:,} trained" if report.lengths_checked else ""
        yield f"{file.file} ({file.split}): {file.records:,} records, {file.examples:,} examples{tokens}"
        if file.removed_tokens:
            yield (
                f"  too long: {file.dropped:,} left out, {file.shortened:,} cut, "
                f"{file.removed_tokens:,} tokens lost (--truncation)"
            )
    verdict = "training would be wrong" if report.errors else "ready for training"
    yield f"{report.errors:,} errors, {report.warnings:,} warnings: {verdict}"


def _fixed_lines(fixed: Fixed) -> Iterator[str]:
    yield f"{fixed.folder}: {', '.join(path.name for path in fixed.files)} written; what changed:"
    by_kind = sorted(fixed.changes, key=lambda change: change.kind)
    for kind, group in groupby(by_kind, key=lambda change: change.kind):
        changes: list[LineChange] = list(group)
        yield from (f"  {Path(c.file).name} line {c.line}: {c.message}" for c in changes[:SHOWN])
        if fixed.counts[kind] > SHOWN:
            yield f"  ... and {fixed.counts[kind] - SHOWN:,} more of {kind}; --json lists {len(changes):,}"
    if not fixed.changes:
        yield "  nothing"
