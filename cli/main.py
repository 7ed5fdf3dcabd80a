"""Entry point. Commands are imported when they are called, so `mlx-afm --help` is quick."""

from __future__ import annotations

import sys

try:  # Ctrl-C may come while these are imported, before `main` can handle it
    from importlib import import_module
    from io import TextIOWrapper
    from typing import Any

    import click

    from mlx_afm._version import __version__
    from mlx_afm.errors import AFMError, SettingError
    from mlx_afm.spelling import nearest_name

    from .output import describe_os_error
    from .parameters import current_name
except KeyboardInterrupt:
    sys.stderr.write("mlx-afm: interrupted\n")
    sys.exit(130)

# Command -> what `--help` says of it. Each lives in the module of its name, as `command`.
COMMANDS = {
    "convert": "Toolkit folder to MLX folder, and back.",
    "lora": "Train a LoRA adapter, or score one.",
    "recover": "Train an adapter that recovers what quantization lost.",
    "draft": "Train a draft model that makes answers faster.",
    "estimate": "Estimate the memory of a training run.",
    "plot": "Draw the loss curves of runs.",
    "fuse": "Merge an adapter into the weights.",
    "generate": "Answer one prompt.",
    "chat": "Chat with a model.",
    "serve": "Serve OpenAI's API over HTTP: one base model, many adapters.",
    "export": "Write an adapter as NAME.fmadapter and check it.",
    "adapter": "Convert adapters between their three forms.",
    "check": "Check a .fmadapter package.",
    "inspect": "Describe a file or folder.",
    "data": "Check, measure, show, split and convert training data.",
    "toolkit": "Apple's toolkit, with its own commands and options.",
    "cache": "List or delete what is kept on disk to save time.",
    "demo": "Run all steps on the bundled tiny model.",
}


class LazyCommands(click.Group):
    """A group that knows its commands by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}_command", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": current_name}
)
@click.version_option(__version__, prog_name="mlx-afm")
def group() -> None:
    """Apple's on-device foundation model (AFM text v7) on MLX.

    Results go to stdout, progress to stderr. Exit codes: 0 fine, 1 an error, 2 wrong usage,
    3 a check failed.
    """


def _without_far_names(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error without suggestions that only look like the option: `--test-batches` is not `--val-batches`."""
    near = [name for name in error.possibilities or () if nearest_name(error.option_name, [name])]
    return click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        code: Any = group.main(arguments, standalone_mode=False)
    except AFMError as error:
        click.echo(f"mlx-afm: {error}", err=True)
        sys.exit(2 if isinstance(error, SettingError) else 1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            error = _without_far_names(error)
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("mlx-afm: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        click.echo(f"mlx-afm: {describe_os_error(error)}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
