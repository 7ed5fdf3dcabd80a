"""`mlx-afm generate`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from mlx_afm.data.config import DataConfig
from mlx_afm.files import to_path

from .data_options import record_options
from .generate_checks import require_sense
from .generate_extras import extra_options, open_extras
from .generate_options import generate_options
from .output import json_option, note, read_stdin, show
from .parameters import PATH, example
from .system_prompt_options import system_prompt_options


@click.command("generate", epilog=example("mlx-afm generate --model afm-mlx --prompt 'Write a title.'"))
@click.option("--model", type=PATH, required=True, help="MLX model folder.")
@click.option("--adapter-path", type=PATH, help="Adapter folder, .pt or .fmadapter.")
@click.option(
    "--prompt",
    "-p",
    required=True,
    help="The prompt; - reads it from stdin; a .jsonl file has one conversation a line.",
)
@click.option(
    "--output",
    type=PATH,
    help="File for the answers to a .jsonl; run the same command again to continue a stopped run.",
)
@click.option(
    "--batch-size", type=int, default=16, show_default=True, help="Prompts of a .jsonl that are answered at once."
)
@system_prompt_options
@click.option(
    "--prompt-cache-file",
    type=PATH,
    help="A .safetensors file for keys and values of the prompt: written if it does not exist, else used for "
    "the tokens that both prompts begin with.",
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
    data_config: DataConfig,
    prompt_cache_file: Path | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Answer one prompt, or each conversation of a file."""
    from .generate_file import answer_prompts, names_a_file

    of_file = names_a_file(prompt)
    require_sense(of_file, options)
    if of_file:
        assert output is not None
        answer_prompts(to_path(prompt), output, batch_size, data_config, as_json, **options)
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
