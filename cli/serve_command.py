"""`mlx-afm serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from .output import json_option, note, show
from .parameters import PATH, SIZE, SIZE_OR_NONE, example, named_paths, refuse_given
from .speculation_options import speculation_options
from .system_prompt_options import system_prompt_options


@click.command("serve", epilog=example("mlx-afm serve --model afm-mlx --adapter titles=my-adapter --port 8080"))
@click.option("--model", required=True, help="MLX model folder.")
@click.option("--adapter", "named", multiple=True, metavar="NAME=PATH", help="An adapter and its model id; repeatable.")
@click.option("--adapters-dir", type=PATH, help="Serve every adapter in this folder under its file name.")
@click.option(
    "--adapter-memory",
    type=SIZE_OR_NONE,
    default="1GB",
    show_default=True,
    help="Memory for all loaded adapters, such as 200MB.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; an address that other machines reach needs --api-key.",
)
@click.option("--port", type=int, default=8080, show_default=True, help="Port; 0 for a free one.")
@click.option("--api-key", envvar="MLX_AFM_API_KEY", help="Key that clients must send; default: $MLX_AFM_API_KEY.")
@click.option("--model-id", help="Model id of the base model; default: its folder's name.")
@click.option(
    "--max-tokens", type=int, default=512, show_default=True, help="Longest answer if the request does not set it."
)
@click.option(
    "--temp",
    "temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Temperature if the request does not set it.",
)
@system_prompt_options
@click.option(
    "--context",
    "context_tokens",
    type=int,
    default=4096,
    show_default=True,
    help="Longest prompt and answer together, in tokens.",
)
@click.option("--rows", type=int, default=8, show_default=True, help="Answers generated at the same time.")
@click.option(
    "--batch-size", type=int, default=8, show_default=True, help="Rows in one step; 1: no rounding between users."
)
@speculation_options
@click.option("--kv-bits", type=click.Choice(["8"]), help="Hold keys and values in int8, as in generate.")
@click.option(
    "--prefix-cache",
    type=SIZE_OR_NONE,
    default="256MB",
    show_default=True,
    help="Memory for keys and values of prompt prefixes; 0 turns this off.",
)
@click.option(
    "--queue", type=int, default=64, show_default=True, help="Requests that may wait; more are refused with 429."
)
@click.option("--connections", type=int, default=256, show_default=True, help="Connections open at the same time.")
@click.option("--max-body", type=SIZE, default="1MB", show_default=True, help="Largest request.")
@click.option("--request-timeout", type=float, default=300.0, show_default=True, help="Seconds for an answer.")
@click.option("--body-timeout", type=float, default=30.0, show_default=True, help="Seconds for a request to arrive.")
@click.option("--grace", type=float, default=30.0, show_default=True, help="Seconds to finish after SIGINT or SIGTERM.")
@click.option(
    "--admin-root", type=PATH, multiple=True, help="Folder from which local requests may add adapters; may be repeated."
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web page that may read answers (CORS), such as https://app.example; repeatable.",
)
@click.option(
    "--strict-turns",
    is_flag=True,
    help="Refuse two turns of one role in a row and late system messages instead of joining them.",
)
@click.option("--docs/--no-docs", default=True, show_default=True, help="OpenAPI page at /docs.")
@click.option("--page/--no-page", default=True, show_default=True, help="Page for people at /.")
@json_option
def command(model: str, named: tuple[str, ...], adapters_dir: Path | None, as_json: bool, **settings: Any) -> None:
    """Answer over HTTP as OpenAI's API does; every adapter is a model id."""
    from mlx_afm.serving import find_adapters, serve, settle
    from mlx_afm.serving.running import Running

    if settings["draft_model"] is None:
        refuse_given(("num_draft_tokens",), "without --draft-model")
    adapters = {} if adapters_dir is None else find_adapters(adapters_dir)
    given = named_paths(named)
    if twice := sorted(adapters.keys() & given.keys()):
        raise click.UsageError(f"--adapter: {', '.join(twice)}: --adapters-dir has an adapter of this name too")
    adapters |= given

    def ready(server: Running) -> None:
        show({"url": server.url, "models": list(server.models)}, as_json)

    try:
        asyncio.run(serve(model, adapters, _config(**settings), ready, note, signals=True))
    finally:
        settle()


def _config(
    *, adapter_memory: int, prefix_cache: int, max_body: int, admin_root: tuple[Path, ...], **settings: Any
) -> Any:
    from mlx_afm.serving import ServeConfig

    seconds = {name: settings.pop(name) for name in ("request_timeout", "body_timeout", "grace")}
    settings["kv_bits"] = None if settings["kv_bits"] is None else int(settings["kv_bits"])
    return ServeConfig(
        adapter_bytes=adapter_memory,
        prefix_bytes=prefix_cache,
        body_bytes=max_body,
        admin_roots=admin_root,
        request_seconds=seconds["request_timeout"],
        body_seconds=seconds["body_timeout"],
        grace_seconds=seconds["grace"],
        **settings,
    )
