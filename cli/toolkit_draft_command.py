"""`mlx-afm toolkit train_draft_model`."""

from __future__ import annotations

import click

from .output import json_option


@click.command("train_draft_model", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(arguments: tuple[str, ...], as_json: bool) -> None:
    """Refused: draft models cannot be trained here yet."""
    from mlx_afm.errors import ConfigError

    raise ConfigError(
        "draft models cannot be trained yet",
        where="train_draft_model",
        advice="Packages are complete without one. A draft checkpoint trained with Apple's toolkit is exported by "
        "export_fmadapter --draft-checkpoint.",
    )
