"""docs/cli.md says what the commands say, and each command shows how it is called."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
import pytest

from mlx_afm_cli.main import group

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_cli_docs

    advice = f"run {Path(sys.executable).name} tools/make_cli_docs.py"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli_docs.document(), advice


def commands(group, path):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(group, "mlx-afm"))


@pytest.mark.parametrize("path", sorted(set(COMMANDS) - {"mlx-afm toolkit train_draft_model"}))  # which is refused
def test_the_help_of_a_command_ends_with_an_example_of_it(path):
    command = COMMANDS[path]
    *before, line = command.epilog.splitlines()
    assert before == ["\b", "Example:"]
    words = shlex.split(line)
    assert " ".join(words).startswith(f"{path} ")
    if isinstance(command, click.Group):
        return  # an example of one of its commands
    options = {name for option in command.params for name in option.opts}
    given = words[len(path.split()) :]
    assert {word for word in given if word.startswith("-")} <= options
    required = [option for option in command.params if option.required]
    assert [
        option.name for option in required if not (set(option.opts) & set(given)) and option.opts[0][:1] == "-"
    ] == []
