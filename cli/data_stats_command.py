"""`mlx-afm data stats`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.data.stats import Bin, SplitStats
from mlx_afm.files import to_json
from mlx_afm.workflows.check_data import stats as measure

from .data_options import data_argument, data_config_options
from .output import json_option
from .parameters import PATH, example, refuse_given
from .progress import BytesProgress

BAR = 40  # characters of the longest bar


@click.command("stats", epilog=example("mlx-afm data stats my-data --model afm-mlx"))
@data_argument
@click.option("--model", type=PATH, required=True, help="Model folder, for its tokenizer.")
@data_config_options
@json_option
def stats(data: Path, model: Path, data_config: DataConfig, as_json: bool) -> None:
    """Say how many tokens the data has, whose they are, how long examples are, and what packing saves.

    Examples are measured whole.
    """
    refuse_given(("truncation",), "here: examples are measured whole")
    with BytesProgress("measuring") as progress:
        splits = measure(data, model, data_config, on_progress=progress.handle)
    if as_json:
        click.echo(to_json({"splits": {name: split.to_dict() for name, split in splits.items()}}))
        return
    for place, (name, split) in enumerate(splits.items()):
        click.echo("\n".join(["", *_lines(name, split)][0 if place else 1 :]))


def _lines(name: str, split: SplitStats) -> Iterator[str]:
    faulty = f"; {split.faulty_lines:,} faulty lines left out, see data check" if split.faulty_lines else ""
    yield f"{name}: {split.examples:,} examples, {split.tokens:,} tokens{faulty}"
    shares = {"trained": split.trained_tokens, **{role: count for role, count in split.role_tokens.items() if count}}
    yield from (f"  {what:<9} {count:>13,}  {count / split.tokens:6.1%}" for what, count in shares.items())
    beyond = f"{split.longer:,} longer than the limit of {split.limit:,}"
    yield f"  length: mean {split.mean:.1f}, median {split.median:,}, 95 % up to {split.percentile_95:,}; {beyond}"
    yield from _bars(split.histogram)
    longest = ", ".join(
        f"{Path(place.file).name} line {place.line} ({place.tokens:,})" for place in split.longest_examples
    )
    yield f"  longest: {longest}"
    yield (
        f"  batches of {split.batch_size}: {split.padded_tokens:,} tokens padded, {split.tokens:,} packed "
        f"({_saved(split.tokens, split.padded_tokens)}), {split.shared_tokens:,} with each system prompt once "
        f"({_saved(split.shared_tokens, split.padded_tokens)})"
    )
    yield (
        f"  system prompt: mean {split.system_mean:.1f} tokens, longest {split.system_longest:,}: "
        f"{split.system_mean / split.limit:.1%} and {split.system_longest / split.limit:.1%} of {split.limit:,}"
    )


def _bars(histogram: tuple[Bin, ...]) -> Iterator[str]:
    most = max(bar.examples for bar in histogram)
    first = next(place for place, bar in enumerate(histogram) if bar.examples)
    width = len(f"{histogram[-1].high - 1:,}")
    for bar in histogram[first:]:
        drawn = "#" * -(-bar.examples * BAR // most)
        yield f"    {bar.low:>{width},}-{bar.high - 1:<{width},} {drawn:<{BAR}} {bar.examples:,}"


def _saved(less: int, more: int) -> str:
    return f"{less / more - 1:+.1%}"
