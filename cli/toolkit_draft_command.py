"""`mlx-afm toolkit train_draft_model`."""

from __future__ import annotations

import click

from .output import json_option


@click.command("train_draft_model", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(arguments: tuple[str, ...], as_json: bool) -> None:
    """Refused: `mlx-afm draft --loss toolkit` trains draft models, with options of its own."""
    from mlx_afm.errors import ConfigError

    raise ConfigError(
        "draft models are not trained with the toolkit's options",
        where="train_draft_model",
        advice="mlx-afm draft --loss toolkit trains one with the same loss and writes draft-model-final.pt, which "
        "export_fmadapter --draft-checkpoint takes.",
    )
