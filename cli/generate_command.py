"""`mlx-afm generate`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from mlx_afm.data.config import DataConfig

from .data_options import record_options
from .generate_extras import extra_options, open_extras
from .generate_options import generate_options
from .output import json_option, note, read_stdin, show
from .system_prompt_options import system_prompt_options


@click.command("generate")
@click.option("--model", type=Path, required=True, help="MLX model folder.")
@click.option("--adapter-path", type=Path, help="Adapter folder, .pt or .fmadapter.")
@click.option(
    "--prompt", "-p", required=True, help="The user's text; - reads it from stdin; a .jsonl has a conversation a line."
)
@click.option("--output", type=Path, help="Where the answers to a .jsonl go; the same command goes on after a kill.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Prompts of a .jsonl answered at once.")
@system_prompt_options
@click.option(
    "--prompt-cache-file",
    type=Path,
    help="Keys and values of the prompt: written if there is no such .safetensors, else used for what is alike.",
)
@generate_options
@extra_options
@record_options
@click.option("--verbose", type=bool, default=False, show_default=True, help="Token counts and speed, on stderr.")
@json_option
def command(
    prompt: str,
    output: Path | None,
    batch_size: int,
    reading: DataConfig,
    prompt_cache_file: Path | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Answer one prompt, or each conversation of a file."""
    from .generate_file import answer_prompts, names_a_file

    if names_a_file(prompt):
        if output is None or prompt_cache_file is not None:
            raise click.UsageError("a .jsonl of prompts goes with --output, and not with --prompt-cache-file")
        if reading.transform is not None:
            raise click.UsageError("--transform is for training data")
        answer_prompts(Path(prompt), output, batch_size, reading, as_json, **options)
    elif output is not None:
        raise click.UsageError("--output goes with a --prompt that names a .jsonl")
    else:
        text = read_stdin() if prompt == "-" else prompt
        _answer(text, prompt_cache_file, as_json, verbose, **options)


def _answer(
    text: str,
    prompt_cache: Path | None,
    as_json: bool,
    verbose: bool,
    *,
    model: Path,
    adapter_path: Path | None,
    system: str | None,
    config: Any,
    **extra: Any,
) -> None:
    from mlx_afm.generation import stream_generate
    from mlx_afm.generation.prompt_cache import prompt_cache_file
    from mlx_afm.workflows.load import load_for_answers

    loaded, tokenizer = load_for_answers(model, adapter_path, system, note)
    extras = open_extras(loaded, tokenizer, compares=verbose or as_json, **extra)
    messages: list[dict[str, Any]] = [{"role": "user", "content": text, **extras.question}]
    pieces = []
    kept = nullcontext() if prompt_cache is None else prompt_cache_file(prompt_cache, loaded, kv_bits=config.kv_bits)
    with kept as prefixes:
        for response in stream_generate(loaded, tokenizer, messages, config, prefix_cache=prefixes, **extras.options):
            pieces.append(response.text)
            if not as_json:
                click.echo(response.text, nl=False)
    counts = {
        "prompt_tokens": response.prompt_tokens,
        "generation_tokens": response.generation_tokens,
        "finish_reason": response.finish_reason,
    }
    if not as_json:
        click.echo()
    told = extras.tell(verbose=verbose)
    if as_json:
        show({"text": "".join(pieces), **counts, **told}, as_json)
    if verbose:
        note(
            f"prompt {counts['prompt_tokens']} tokens, {response.prompt_tps:.1f} per second; "
            f"answer {counts['generation_tokens']} tokens, {response.generation_tps:.1f} per second"
        )
