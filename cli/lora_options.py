"""The options of `mlx-afm lora`, and those of them that `mlx-afm recover` has.

Training and adapter options have no defaults here: the dataclasses have, below file and flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from . import data_options
from .parameters import PATH

DATA_PLACE = click.option("--data", type=PATH, help="Folder with train/valid/test.jsonl, or one file.")
SETTINGS = click.option("--config", "-c", type=PATH, help="YAML file with these options; flags win.")
PLACES = [
    click.option("--model", type=PATH, help="MLX model folder."),
    DATA_PLACE,
    click.option("--adapter-path", type=PATH, help="Folder for the adapter.  [default: adapters]"),
    SETTINGS,
]
JOBS = [
    click.option("--train", is_flag=True, help="Train."),
    click.option("--test", is_flag=True, help="Score the adapter on test.jsonl."),
    click.option("--best", is_flag=True, help="With --test: score the run's best adapter, not its last one."),
]
RESUME = [
    click.option("--resume", is_flag=True, help="Continue the run that is in its folder."),
    click.option("--overwrite", is_flag=True, help="Replace a finished run that is in its folder."),
]
START = [
    click.option(
        "--resume-adapter-file",
        type=PATH,
        help="Adapter whose values a new run starts from: folder, .pt or .fmadapter.",
    ),
    click.option("--name", help="Name for a package that you export later; checked before training."),
]
DATA = [
    *data_options.OPTIONS,
    data_options.no_cache_option,
]
LENGTH = [
    click.option("--iters", type=int, help="Optimizer steps; default: by epochs."),
    click.option("--epochs", type=int, help="Passes over the data.  [default: 2]"),
    click.option("--batch-size", type=int, help="Examples per step.  [default: 4]"),
    click.option(
        "--batch-tokens", type=int, help="Instead of --batch-size: pack examples into rows of this many tokens."
    ),
    click.option("--grad-accumulation-steps", type=int, help="Batches per step.  [default: 1]"),
    click.option(
        "--grad-checkpoint", is_flag=True, default=None, help="Uses the least memory; takes about a third more time."
    ),
    click.option(
        "--ignore-memory",
        is_flag=True,
        default=None,
        help="Train even if the estimated peak memory is above this machine's.",
    ),
    click.option(
        "--frozen-cache",
        metavar="auto|SIZE|recompute|off",
        help="Where the lower layers are not trained (--num-layers): keep what they compute for each example on disk, "
        "and do not compute it again. SIZE is the most that is kept, such as 20GB.  [default: auto, where it pays]",
    ),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option(
        "--rank-timeout-seconds",
        type=float,
        help="Under mlx.launch: how long to wait for the other processes.  [default: 600]",
    ),
]
LORAPLUS = click.option(
    "--loraplus-ratio", type=float, help="LoRA+: learning rate of lora_b, as a multiple of --learning-rate."
)
RATE = [
    click.option("--learning-rate", type=float, help="Peak rate.  [default: 0.001]"),
    click.option(
        "--warmup", type=float, help="Steps until the peak rate: below 1 a share of all steps.  [default: 0.05]"
    ),
    click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), help="[default: cosine]"),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "adam", "sgd", "muon", "adafactor"]),
        help="Set betas, eps, momentum with optimizer_config in the YAML file.  [default: adamw]",
    ),
    click.option("--weight-decay", type=float, help="[default: 0.01 for adamw and muon, 0 for others]"),
    click.option(
        "--no-decay",
        help="Tensors without weight decay: the ends of their names, with commas.  [default: norm.weight,.m]",
    ),
    LORAPLUS,
    click.option("--clip-grad-norm", type=float, help="0 for no limit.  [default: 1.0]"),
    click.option(
        "--max-skipped-steps",
        type=int,
        help="End the run after this many steps in a row without a finite gradient.  [default: 10]",
    ),
]
WATCH = [
    click.option("--steps-per-report", type=int, help="[default: 10]"),
    click.option("--steps-per-eval", type=int, help="0 for once an epoch.  [default: 200]"),
    click.option("--val-batches", type=int, help="-1 for all.  [default: -1]"),
    click.option(
        "--patience", type=int, help="End the run after this many evaluations without a new best; 0 for never."
    ),
    click.option("--save-every", type=int, help="Steps.  [default: 100]"),
    click.option("--sample-prompt", multiple=True, help="A prompt to answer after each evaluation; may be repeated."),
    click.option("--sample-tokens", type=int, help="Longest such answer.  [default: 64]"),
    click.option("--report-to", help="Some of wandb,swanlab,tensorboard, beside metrics.jsonl."),
    click.option("--project-name", help="Project name for --report-to.  [default: mlx-afm]"),
]
KIND = [
    click.option("--fine-tune-type", type=click.Choice(["lora", "dora", "full", "qat"]), help="[default: lora]"),
]
FORM = [
    click.option("--rank", type=int, help="Devices take 32.  [default: 32]"),
    click.option("--scale", type=float, help="alpha / rank; devices apply 0.5.  [default: 0.5]"),
    click.option("--alpha", type=float, help="Instead of --scale."),
    click.option("--use-rslora", is_flag=True, default=None, help="The scale is alpha / sqrt(rank)."),
    click.option("--dropout", type=float, help="[default: 0]"),
    click.option("--targets", help="Some of q,k,v,o,gate,up,down.  [default: all]"),
    click.option("--layers", help="all, ordinary, reuse, or numbers such as 0-34,50.  [default: all]"),
    click.option("--num-layers", type=int, help="The last so many layers; -1 for all."),
]


# What an estimate takes of these: what memory depends on, and what may stand beside it.
ESTIMATED = [
    click.option("--config", "-c", type=PATH, help="YAML file with options of lora; flags win."),
    *DATA,
    *LENGTH,
    *RATE,
    *KIND,
    *FORM,
]


def with_options(function: Callable[..., int]) -> Callable[..., int]:
    """The function with every option, in the order of the help."""
    run = [*PLACES, *JOBS, *RESUME, *START]
    return _with(function, [*run, *DATA, *LENGTH, *RATE, *WATCH, *KIND, *FORM])


def recovery_options(function: Callable[..., int]) -> Callable[..., int]:
    """The function with the options that `mlx-afm recover` shares."""
    return _with(function, [*PLACES, *RESUME, *DATA, *LENGTH, *RATE, *WATCH, *FORM])


def draft_options(function: Callable[..., int]) -> Callable[..., int]:
    """The function with the options that `mlx-afm draft` shares."""
    rate = [option for option in RATE if option is not LORAPLUS]  # of a low-rank adapter
    return _with(function, [DATA_PLACE, SETTINGS, *RESUME, *DATA, *LENGTH, *rate, *WATCH])


def _with(function: Callable[..., int], options: list[Callable[..., Any]]) -> Callable[..., int]:
    for option in reversed(options):
        function = option(function)
    return function
