"""`mlx-afm generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import json_option, note, read_stdin, show


@click.command("generate")
@click.option("--model", type=Path, required=True, help="MLX model folder.")
@click.option("--adapter-path", type=Path, help="Adapter folder, .pt or .fmadapter.")
@click.option("--prompt", "-p", required=True, help="The user's text; - reads it from stdin.")
@click.option("--system-prompt", help="System message; default: the model's own.")
@click.option("--max-tokens", "-m", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Only the K most likely tokens; 0 for all.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Least probability, relative to the top token."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.option(
    "--kv-bits", type=click.Choice(["8"]), help="Hold keys and values in int8: half the memory of 16 bits, same answer."
)
@click.option("--verbose", type=bool, default=False, show_default=True, help="Token counts and speed, on stderr.")
@json_option
def command(
    model: Path,
    adapter_path: Path | None,
    prompt: str,
    system_prompt: str | None,
    as_json: bool,
    verbose: bool,
    kv_bits: str | None,
    **settings: Any,
) -> None:
    """Answer one prompt."""
    from mlx_afm.generation import GenerateConfig, stream_generate
    from mlx_afm.workflows.load import load

    config = GenerateConfig(kv_bits=None if kv_bits is None else int(kv_bits), **settings)
    text = read_stdin() if prompt == "-" else prompt
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    loaded, tokenizer = load(model, adapter_path)
    pieces = []
    for response in stream_generate(loaded, tokenizer, messages, config):
        pieces.append(response.text)
        if not as_json:
            click.echo(response.text, nl=False)
    counts = {
        "prompt_tokens": response.prompt_tokens,
        "generation_tokens": response.generation_tokens,
        "finish_reason": response.finish_reason,
    }
    if as_json:
        show({"text": "".join(pieces), **counts}, as_json)
    else:
        click.echo()
    if verbose:
        note(
            f"prompt {counts['prompt_tokens']} tokens, {response.prompt_tps:.1f} per second; "
            f"answer {counts['generation_tokens']} tokens, {response.generation_tps:.1f} per second"
        )
