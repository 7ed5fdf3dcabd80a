"""`mlx-afm-lm-eval`: lm-evaluation-harness with our models, and its options."""

from __future__ import annotations

import sys

import click

from mlx_afm.errors import AFMError

from .output import describe_os_error


def main() -> None:
    """Runs `lm_eval`; says in one line what is wrong with a model or its arguments."""
    try:
        from mlx_afm.evaluation.lm_eval_model import run_lm_eval

        run_lm_eval()
    except AFMError as error:
        click.echo(f"mlx-afm-lm-eval: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"mlx-afm-lm-eval: {describe_os_error(error)}", err=True)
        sys.exit(1)
