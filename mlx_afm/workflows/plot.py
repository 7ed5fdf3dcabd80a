"""Loss curves of one or more runs from their `metrics.jsonl`: as text, as SVG, or as a picture by matplotlib."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mlx_afm.errors import FormatError, MissingDependencyError, SettingError
from mlx_afm.files import atomic_file, to_optional_path, to_path, write_text
from mlx_afm.runs.folder import METRICS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 16, 36, 40
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
NAMES = {"train": "training", "eval": "validation"}

Points = list[tuple[int, float]]


def read_losses(metrics: Path) -> dict[str, Points]:
    """(step, loss) of the reports and evaluations in a `metrics.jsonl`.

    Raises:
        FormatError: no such file, or a line that is not an event.
    """
    if not metrics.is_file():
        raise FormatError("no such file", where=metrics, expected="metrics.jsonl of a run")
    losses: dict[str, Points] = {"train": [], "eval": []}
    for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
        try:
            event = json.loads(line.decode("utf-8"))
            if event["event"] in losses and event["loss"] is not None:  # None: every step was skipped
                losses[event["event"]].append((int(event["step"]), float(event["loss"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise FormatError("not an event of a run", where=f"{metrics} line {number}") from error
    return losses


def loss_curve_svg(losses: Mapping[str, Points], title: str) -> str:
    """An SVG document, a line per series with its name: loss (nats per trained token) over optimizer steps."""
    points = [point for series in losses.values() for point in series]
    last = max((step for step, _ in points), default=1) or 1
    highest = max((loss for _, loss in points), default=1.0) * 1.05 or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / highest

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        level, step = highest * share, round(last * share)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{level:.2f}</text>'
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step}</text>'
        )
    for number, (name, series) in enumerate(losses.items()):
        color = COLORS[number % len(COLORS)]
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in series)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{20 + 16 * number}" text-anchor="end" fill="{color}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    return "\n".join([*parts, "</svg>", ""])


PICTURES = (".png", ".pdf", ".jpg")
MARKS = "*o+x#@%&"  # of the curves in a text plot, training and validation of each run in turn
SIZE = (72, 18)  # columns and rows of a text plot, without its frame


def read_runs(runs: Sequence[str | Path]) -> dict[str, Points]:
    """The curves of some runs by name, "training" and "validation", with the run's name before it if there are several.

    Args:
        runs: run folders, or `metrics.jsonl` files.

    Raises:
        FormatError: no metrics, a damaged line, or nothing to draw.
    """
    folders = [to_path(run) for run in runs]
    curves: dict[str, Points] = {}
    labels = _labels(folders)
    for run, label in zip(folders, labels):
        metrics = run / METRICS if run.is_dir() else run
        for kind, points in read_losses(metrics).items():
            name = NAMES[kind] if len(runs) == 1 else f"{label} {NAMES[kind]}"
            if points:
                curves[name] = points
    if not curves:
        raise FormatError("no losses yet", where=", ".join(map(str, runs)), expected="runs with reports")
    return curves


def _labels(runs: Sequence[Path]) -> list[str]:
    """The folders' names, or whole paths where these agree."""
    folders = [run if run.is_dir() else run.parent for run in runs]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def plot(runs: Sequence[str | Path], output: str | Path | None = None) -> str:
    """The curves as text; with `output` also as a file, by its suffix: .svg, or .png, .pdf, .jpg with matplotlib.

    Raises:
        FormatError: see `read_runs`. ConfigError: an unknown suffix. MissingDependencyError: no matplotlib.
    """
    output = to_optional_path(output)
    if output is not None and output.suffix not in (".svg", *PICTURES):
        expected = f"a name that ends in .svg, {', '.join(PICTURES)}"
        raise SettingError("unknown kind of picture", where=output, expected=expected)
    curves = read_runs(runs)
    title = ", ".join(_labels([to_path(run) for run in runs]))
    if output is not None and output.suffix == ".svg":
        write_text(output, loss_curve_svg(curves, title))
    elif output is not None:
        _write_picture(output, curves, title)
    return text_plot(curves)


def _write_picture(path: Path, curves: Mapping[str, Points], title: str) -> None:
    pyplot = _import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    try:
        for name, points in curves.items():
            axes.plot([step for step, _ in points], [loss for _, loss in points], label=name)
        axes.set(title=title, xlabel="step", ylabel="loss, nats per trained token")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_file(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
    finally:
        pyplot.close(figure)


def _import_pyplot() -> Any:
    try:
        import matplotlib
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        advice = "Install it (pip install 'mlx-afm[plot]'), or ask for a .svg, which needs nothing."
        raise MissingDependencyError("this kind of picture needs matplotlib", advice=advice) from error
    matplotlib.use("Agg")
    return pyplot


def text_plot(curves: Mapping[str, Points], size: tuple[int, int] = SIZE) -> str:
    """Curves in characters: losses upwards, steps to the right, and what each mark means.

    Example: one curve from (0, 4.0) to (10, 2.0) has its mark at the top left and the bottom right.
    """
    columns, rows = size
    points = [point for curve in curves.values() for point in curve]
    last, lowest, highest = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)
    first = min(step for step, _ in points)
    canvas = [[" "] * columns for _ in range(rows)]
    for number, curve in enumerate(curves.values()):
        for step, loss in curve:
            x = round((step - first) / max(last - first, 1) * (columns - 1))
            y = round((highest - loss) / ((highest - lowest) or 1) * (rows - 1))
            canvas[y][x] = MARKS[number % len(MARKS)]
    lines = []
    for row, cells in enumerate(canvas):
        level = highest - (highest - lowest) * row / (rows - 1)
        label = f"{level:8.3f}" if row % 4 == 0 or row == rows - 1 else " " * 8
        lines.append(f"{label} |{''.join(cells)}".rstrip())
    ends = f"{first}{last:>{columns - len(str(first))}}"
    legend = [
        f"{MARKS[number % len(MARKS)]} {name}: {curve[-1][1]:.4f} at step {curve[-1][0]}{_lowest(curve)}"
        for number, (name, curve) in enumerate(curves.items())
    ]
    return "\n".join([*lines, " " * 9 + "+" + "-" * columns, " " * 10 + ends, *legend])


def _lowest(curve: Points) -> str:
    step, loss = min(curve, key=lambda point: (point[1], point[0]))
    return "" if math.isclose(loss, curve[-1][1]) else f", lowest {loss:.4f} at step {step}"
