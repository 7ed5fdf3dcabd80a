"""`mlx-afm data render`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.data.sample import ExampleChoice, Sample
from mlx_afm.files import to_json
from mlx_afm.workflows.check_data import samples

from .data_options import data_argument, data_config_options
from .output import json_option
from .parameters import PATH, example, refuse_given

# What would move a terminal's cursor or change its colours; line breaks and tabs are fine.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@click.command("render", epilog=example("mlx-afm data render my-data --model afm-mlx --count 2"))
@data_argument
@click.option("--model", type=PATH, required=True, help="Model folder, for its tokenizer.")
@click.option("-n", "--count", type=int, default=ExampleChoice.count, show_default=True, help="How many examples.")
@click.option("--seed", type=int, help="Choose them at random; without it they are the first.")
@click.option("--line", type=int, help="The example of this line alone.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), help="[default: the first there is]")
@click.option("--ids", is_flag=True, help="Each token's id and piece too.")
@data_config_options
@json_option
def render(
    data: Path,
    model: Path,
    count: int,
    seed: int | None,
    line: int | None,
    split: str | None,
    ids: bool,
    data_config: DataConfig,
    as_json: bool,
) -> None:
    """Show examples as the model sees them, with what it learns to say highlighted (in «» if not on a terminal)."""
    if line is not None:
        refuse_given(("count",), "with --line")
    chosen = samples(data, model, ExampleChoice(count, seed, line), data_config, split)
    if as_json:
        examples = [sample.to_dict(with_ids=ids) for sample in chosen]
        click.echo(to_json({"examples": examples}))
        return
    colour = _on_terminal() and "NO_COLOR" not in os.environ
    for sample in chosen:
        for text in _lines(sample, ids, colour):
            click.echo(text, color=colour)


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _lines(sample: Sample, ids: bool, colour: bool) -> Iterator[str]:
    facts = sample.to_dict(with_ids=False)
    lost = f", {sample.removed_tokens:,} taken away" if sample.removed_tokens else ""
    head = f"{sample.file} line {sample.line}: {facts['tokens']:,} tokens, {facts['trained_tokens']:,} trained{lost}"
    yield click.style(f"--- {head}", dim=True) if colour else f"--- {head}"
    yield "".join(_marked(_visible(text), trained, colour) for text, trained in sample.texts)
    if ids:
        yield from (
            _marked(f"{token.id:>7}  {_visible(token.piece)}", token.trained, colour) for token in sample.tokens
        )
    yield ""


def _marked(text: str, trained: bool, colour: bool) -> str:
    if not trained:
        return text
    return click.style(text, fg="green", bold=True) if colour else f"«{text}»"


def _visible(text: str) -> str:
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
