"""`mlx-afm toolkit generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import json_option, show
from .parameters import PATH, example
from .toolkit_options import assets_option, open_model, precision_option, without_meaning

WITHOUT_MEANING = {
    "compile_model": "compilation is a matter of torch",
    "draft_checkpoint": "answers come without speculation, and are the same",
    "num_draft_tokens": "answers come without speculation, and are the same",
    "batch_size": "conversations are answered one after the other",
}


@click.command("generate", epilog=example("mlx-afm toolkit generate --checkpoint my.pt --prompt 'Write a title.'"))
@click.option("--prompt", required=True, help="A text, or a .jsonl with a list of messages a line.")
@click.option("--checkpoint", type=PATH, help="Adapter; a .pt, or another form.")
@click.option("--draft-checkpoint", type=PATH, help="No effect.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=50, show_default=True, help="Only the K most likely tokens.")
@click.option("--max-new-tokens", type=int, default=50, show_default=True, help="Longest answer.")
@click.option("--batch-size", type=int, help="No effect.")
@click.option("--num_draft_tokens", "--num-draft-tokens", type=int, help="No effect.")
@click.option("--compile-model", is_flag=True, help="No effect.")
@precision_option
@assets_option
@json_option
def command(
    prompt: str,
    checkpoint: Path | None,
    temperature: float,
    top_k: int,
    max_new_tokens: int,
    precision: str,
    assets: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt, or each conversation of a file: 'Response for prompt N:' and the answer."""
    from mlx_afm.generation import GenerateConfig
    from mlx_afm.workflows.toolkit_generate import answers, conversations_of

    without_meaning(options, WITHOUT_MEANING)
    config = GenerateConfig(max_tokens=max_new_tokens, temp=temperature, top_k=top_k)
    conversations = conversations_of(prompt)  # rather refused before a model is converted than after
    model = open_model(assets, precision)
    found = []
    for number, answer in answers(model, conversations, config, checkpoint=checkpoint):
        found.append(answer)
        if not as_json:
            click.echo(f"Response for prompt {number}:\n{answer}\n")
    if as_json:
        show({"answers": found}, as_json)
