"""`mlx-afm chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .generate_options import generate_options
from .output import json_option
from .parameters import PATH, example, named_paths, refuse_given
from .speculation_options import speculation_options
from .system_prompt_options import system_prompt_options


@click.command("chat", epilog=example("mlx-afm chat --model afm-mlx --adapter-path my-adapter"))
@click.option("--model", type=PATH, required=True, help="MLX model folder.")
@click.option("--adapter-path", type=PATH, help="Adapter folder, .pt or .fmadapter to begin with.")
@click.option(
    "--adapter", "named", multiple=True, metavar="NAME=PATH", help="Adapter for /adapter NAME; may be repeated."
)
@system_prompt_options
@click.option(
    "--context", type=int, default=4096, show_default=True, help="Longest conversation and answer together, in tokens."
)
@generate_options
@speculation_options
@click.option("--verbose", type=bool, default=False, show_default=True, help="Token counts and speed, on stderr.")
@json_option
def command(
    model: Path,
    adapter_path: Path | None,
    named: tuple[str, ...],
    system: str | None,
    context: int,
    config: Any,
    draft_model: Path | None,
    num_draft_tokens: int | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Chat with a model; /help lists the commands.

    A line is a message. One that ends with a backslash goes on in the next; lines between two of three double quotes
    are one message. Ctrl-C stops an answer. With --json each answer is one object on a line.
    """
    from dataclasses import replace

    from mlx_afm.generation.chat import Chat
    from mlx_afm.generation.prompts import require_tokenizer
    from mlx_afm.workflows.chat import ChatModel
    from mlx_afm.workflows.draft_model import load_draft

    from .chat_loop import ChatLoop

    if draft_model is None:
        refuse_given(("num_draft_tokens",), "without --draft-model")
    source = ChatModel(model, named_paths(named), adapter_path)
    tokenizer = require_tokenizer(source.tokenizer)
    speculation = None
    if draft_model is not None:
        speculation = load_draft(draft_model, source.model, tokenizer, num_draft_tokens)
    chat = Chat(
        system=system,
        model=source.model,
        tokenizer=tokenizer,
        config=replace(config, context_tokens=context),
        speculation=speculation,
    )
    ChatLoop(source, chat, as_json=as_json, verbose=verbose).run()
