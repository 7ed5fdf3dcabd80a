"""The loss curve of a run as a picture: `metrics.jsonl` to SVG text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from mlx_afm.errors import FormatError

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
