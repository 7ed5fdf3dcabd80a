"""What an estimate says: its parts, what fits into a machine, and a table of settings for the usual Macs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from mlx_afm.memory import Layout
from mlx_afm.workflows.estimate import (
    BASES,
    TRAINED_SHARE,
    USABLE_SHARE,
    RunPlan,
    largest_rows,
    named_base,
    ways_to_fit,
)

MACS_GB = (8, 16, 24, 32, 64)
ROW_TOKENS = 512  # of the examples in the table
TABLE_BASES = ("float32", "bfloat16", "4-bit", "2-bit")


def report(plan: RunPlan, memory_bytes: int | None, *, mac: bool) -> tuple[dict[str, Any], float | None]:
    """The parts in bytes, whether they fit, and what would; and the limit this was judged by.

    Args:
        plan: the run.
        memory_bytes: of the machine; None if it is not known.
        mac: judge by what macOS leaves to the GPU rather than by all of it.
    """
    estimate = plan.estimate()
    layout = max(plan.layouts, key=lambda layout: layout.rows * layout.tokens)
    found: dict[str, Any] = {**asdict(estimate), "rows": layout.rows, "tokens": layout.tokens, "needed": layout.needed}
    if memory_bytes is None:
        return {**found, "ways_to_fit": {}}, None
    limit = memory_bytes * (USABLE_SHARE if mac or plan.backend == "gpu" else 1.0)
    found |= {"memory_bytes": memory_bytes, "usable_bytes": round(limit), "fits": estimate.peak_bytes <= limit}
    if plan.train.batch_tokens is None:
        found["largest_batch_size"] = largest_rows(plan, limit)
    ways = {} if found["fits"] else dict(ways_to_fit(plan, limit))
    return {**found, "ways_to_fit": ways}, limit


def settings_table(plan: RunPlan, macs_gb: Sequence[int] = MACS_GB) -> list[dict[str, Any]]:
    """Most examples of 512 tokens a step, a quarter of them trained, by memory, base and checkpointing.

    0 means that not even one fits. Full settings are those of `plan`; its layouts and base are replaced.
    """
    layout = Layout(rows=1, tokens=ROW_TOKENS, needed=round(TRAINED_SHARE * ROW_TOKENS))
    rows = []
    for name in TABLE_BASES:
        assert name in BASES
        for checkpointed in (False, True):
            train = replace(plan.train, grad_checkpoint=checkpointed)
            base = named_base(name, plan.model)
            tried = replace(plan, base=base, train=train, layouts=(layout,), backend="gpu")
            most = {str(size): largest_rows(tried, size * 1e9 * USABLE_SHARE) for size in macs_gb}
            smallest = tried.estimate().peak_bytes
            rows.append({"base": name, "grad_checkpoint": checkpointed, "least_bytes": smallest, "rows": most})
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people: tokens a step."""
    macs = list(rows[0]["rows"])
    lines = [
        "| base | `--grad-checkpoint` | 1 x 512 tokens | " + " | ".join(f"{size} GB" for size in macs) + " |",
        "|---|---|---" + "|---" * len(macs) + "|",
    ]
    for row in rows:
        cells = [f"{count} x {ROW_TOKENS}" if count else "-" for count in row["rows"].values()]
        checkpointed = "yes" if row["grad_checkpoint"] else "no"
        start = f"| {row['base']} | {checkpointed} | {row['least_bytes'] / 1e9:.1f} GB | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)
