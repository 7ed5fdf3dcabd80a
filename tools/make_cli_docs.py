"""Writes docs/cli.md from the commands themselves; a test checks that it is current.

python tools/make_cli_docs.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mlx_afm_cli.main import COMMANDS, group

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEADER = """# Commands

Written by `tools/make_cli_docs.py` from the commands; do not edit.

Results go to stdout, progress to stderr; `--json` prints one JSON object. Exit codes: 0 fine, 1 an error (what, where,
expected, found, what to do), 2 wrong usage, 3 a check failed. `python -m mlx_afm` is the same program.
"""


def pages(command: click.Command, path: str) -> Iterator[str]:
    # A command keeps the help option of the first context it meets, so both names are given here too.
    names = group.context_settings["help_option_names"]
    context = click.Context(command, info_name=path, terminal_width=100, max_content_width=100, help_option_names=names)
    yield f"\n## {path}\n\n```\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from pages(command.get_command(context, name), f"{path} {name}")


def document() -> str:
    context = click.Context(group, info_name="mlx-afm")
    return HEADER + "".join(
        page for name in COMMANDS for page in pages(group.get_command(context, name), f"mlx-afm {name}")
    )


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(document(), encoding="utf-8")
