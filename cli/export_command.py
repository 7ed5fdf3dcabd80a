"""`mlx-afm export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlx_afm.files import to_json

from .asset_pack_options import make_pack, open_draft, pack_settings, require_pack, with_pack_options
from .check_command import show_report
from .outcome import chosen_adapter
from .output import json_option, note
from .parameters import PATH, example, refuse_given


def parse_creator_defined(values: tuple[str, ...]) -> dict[str, Any]:
    """The keys that `--creator-defined` options give, later ones over earlier ones.

    Raises:
        click.BadParameter: neither K=V nor a file with a JSON object.
    """
    from mlx_afm.errors import FormatError
    from mlx_afm.files import read_json, to_path

    merged: dict[str, Any] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if equals and key:
            merged[key] = text
            continue
        try:
            content = read_json(to_path(value))
        except FormatError as error:
            raise click.BadParameter(f"neither K=V nor a JSON file: {error}", param_hint="--creator-defined") from error
        if not isinstance(content, dict):
            raise click.BadParameter(f"{value} holds no JSON object", param_hint="--creator-defined")
        merged |= content
    return merged


@click.command("export", epilog=example("mlx-afm export --adapter-path my-adapter --name titles --toolkit TOOLKIT"))
@click.option("--adapter-path", "adapter", type=PATH, required=True, help="Adapter folder, .pt or .fmadapter.")
@click.option("--best", is_flag=True, help="Export the best adapter of the run in --adapter-path, not its last one.")
@click.option("--name", required=True, help="Letters, digits, underscores; devices refuse hyphens.")
@click.option("--output-dir", type=PATH, default=Path("."), show_default=True, help="Where NAME.fmadapter goes.")
@click.option("--model", type=PATH, help="Base model folder: fills modules that were not trained, compares logits.")
@click.option("--toolkit", type=PATH, help="Toolkit folder: its signature, and the assets of the draft pair.")
@click.option("--author", help="Default: 3P developer, as the toolkit writes.")
@click.option("--description", help="Free text.")
@click.option("--license", help="Free text.")
@click.option("--creator-defined", metavar="K=V|FILE", multiple=True, help="Text, or a JSON object, for the app.")
@click.option("--signature", help="40 hex digits of the base model; default: toolkit 26.0.0's.")
@click.option("--reduce-rank", is_flag=True, help="Approximate a rank above 32 and state the error.")
@click.option("--zero-untrained", is_flag=True, help="Zeros where the base model's own tensors are not at hand.")
@click.option("--compare/--no-compare", default=True, help="With --model: logits before and after.  [default: compare]")
@click.option(
    "--reference-answers",
    is_flag=True,
    help="With --model: write NAME.reference_answers.json, prompts and greedy answers.",
)
@click.option(
    "--prompt", "prompts", multiple=True, help="To compare on and for the reference answers; three by default."
)
@with_pack_options
@json_option
def command(
    as_json: bool, best: bool, creator_defined: tuple[str, ...], prompts: tuple[str, ...], **options: Any
) -> None:
    """Write an adapter as NAME.fmadapter for OS 26.x devices, and check it.

    A smaller rank is padded to 32 and another scale folded in, both exactly.
    """
    from mlx_afm.formats.fmadapter import no_files
    from mlx_afm.workflows.export import ExportConfig, export_package

    if options["model"] is None:
        refuse_given(("compare", "prompts"), "without --model")
    elif not options["compare"] and not options["reference_answers"]:
        refuse_given(("prompts",), "with --no-compare and without --reference-answers")
    if options["signature"] is not None and options["draft_checkpoint"] is None:
        refuse_given(("toolkit",), "with --signature and without --draft-checkpoint")
    options["adapter"] = chosen_adapter(options["adapter"], best)
    pack = pack_settings(options)
    require_pack(pack)
    draft = open_draft(options)
    if prompts:
        options["prompts"] = prompts
    config = ExportConfig(**options, creator_defined=parse_creator_defined(creator_defined))
    exported = export_package(config, no_files if draft is None else draft.write, note)
    for text in exported.notes():
        note(text)
    note(f"wrote {exported.package}")
    if exported.reference_answers is not None:
        note(f"wrote {exported.reference_answers}")
    packed = make_pack(exported.package, exported.metadata.identifier, pack)
    if as_json:
        click.echo(to_json({**exported.to_dict(), **packed}))
    else:
        show_report(exported.report, False)
    sys.exit(0 if exported.report.ok else 3)
