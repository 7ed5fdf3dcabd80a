"""Options of `mlx-afm generate`: an answer that follows a schema, and a draft model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from .output import note
from .parameters import PATH
from .speculation_options import speculation_options


def extra_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command."""
    text = "JSON file of a schema or response format that the answer follows."
    return speculation_options(click.option("--response-format", type=PATH, help=text)(command))


@dataclass
class Extras:
    """What the options came to.

    Attributes:
        question: keys of the user's message.
        options: of `stream_generate`.
    """

    question: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def tell(self, *, verbose: bool) -> dict[str, Any]:
        """What the JSON object has besides; and it is said on stderr."""
        guided, speculation = self.options.get("logits_processors"), self.options.get("speculation")
        told: dict[str, Any] = {}
        if guided:
            told["complete"] = guided[0].complete
            if not guided[0].complete:
                note("the answer was cut before it was what the response format asks for; raise --max-tokens")
        if speculation:
            told["speculation"] = speculation.summary()
            if verbose and speculation.rounds:
                gain = "" if (times := speculation.speed_up) is None else f", {times:.2f} times as fast as without"
                rate, each = speculation.acceptance_rate, speculation.tokens_per_round
                note(f"draft: {rate:.0%} accepted, {each:.2f} tokens a round{gain}")
        return told


def open_extras(
    model: Any,
    tokenizer: Any,
    *,
    compares: bool,
    draft_model: Path | None,
    num_draft_tokens: int | None,
    response_format: Path | None,
) -> Extras:
    """The draft model and the schema.

    Args:
        model, tokenizer: from `load`.
        compares: time plain steps too.
        draft_model, num_draft_tokens, response_format: the options.
    """
    extras = Extras()
    if draft_model is not None:
        from mlx_afm.workflows.draft_model import load_draft

        extras.options["speculation"] = load_draft(draft_model, model, tokenizer, num_draft_tokens)
        extras.options["speculation"].compares = compares
    if response_format is not None:
        from mlx_afm.generation.guided import guided_processor
        from mlx_afm.workflows.response_format import read_response_format

        wanted = read_response_format(response_format)
        extras.options["logits_processors"] = [guided_processor(tokenizer, wanted.guide)]
        if wanted.message is not None:
            extras.question["response_format"] = wanted.message
    return extras
