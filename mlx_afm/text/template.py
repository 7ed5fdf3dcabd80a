"""The chat template (version 6): messages to text, text to ids, and which ids are trained.

    <turn_start> system<n>TEXT[<n>system tools: JSON<n>JSON...]<turn_end>
    <turn_start> user<n>TEXT<turn_end>
    <turn_start> assistant<n>TEXT<turn_end>          TEXT and <turn_end> are trained

without the line breaks; `<n>` is the newline token. The end-of-sequence id stands in front. The
last line without TEXT and `<turn_end>` asks for an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mlx_afm.errors import ConfigError, DataError
from mlx_afm.files import to_json
from mlx_afm.text.messages import ROLES, Message
from mlx_afm.text.values import parse_arguments

DEFAULT_SYSTEM = "A conversation between a user and a helpful assistant."
TURN_START, TURN_END, NEWLINE = "<turn_start>", "<turn_end>", "<n>"
EXECUTABLE_START, EXECUTABLE_END = "<executable_start>", "<executable_end>"
SPECIAL_TOKENS = (TURN_START, TURN_END, EXECUTABLE_START, EXECUTABLE_END)
ASSISTANT = "assistant"


class TurnEncoder(Protocol):
    """What the chat template asks of a tokenizer; see `AFMTokenizer`."""

    eos_id: int
    prefix_id: int
    turn_start_id: int
    turn_end_id: int
    newline_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""


class Span(NamedTuple):
    """A piece of a rendered conversation that is trained as a whole or not at all.

    The texts of all spans, put together, are the rendered conversation. A turn is two spans: its
    head (`<turn_start> user<n>`) and its body, which ends with `<turn_end>`.

    Attributes:
        text: of the span.
        weight: loss weight of each of its tokens; 0 for a span that is not trained.
        role: whose turn it belongs to.
    """

    text: str
    weight: float
    role: str

    @property
    def trained(self) -> bool:
        """Whether its tokens are targets."""
        return self.weight > 0


class Turn(NamedTuple):
    """Where one turn lies in the ids.

    Attributes:
        role: whose it is.
        start: its `<turn_start>`.
        body: first token of its text.
        stop: one past its `<turn_end>`.
    """

    role: str
    start: int
    body: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """Ids, and for each of them its loss weight: above 0 if the model should learn to say it.

        ids      </s> <turn_start> _user <n> hi <turn_end> <turn_start> _assistant <n> ok <turn_end>
        weights   0        0         0    0  0      0           0           0       0  1      1
        turns          user: start 1, body 4, stop 6            assistant: start 6, body 9, stop 11

    `weights[t]` is about `ids[t]` itself; shifting by one for the loss comes later. An open turn at
    the end, which asks for an answer, is not among `turns`.
    """

    ids: list[int]
    weights: list[float]
    turns: tuple[Turn, ...] = ()

    @property
    def trained(self) -> list[bool]:
        """Whether each id is a target."""
        return [weight > 0 for weight in self.weights]


def render(
    messages: Sequence[Message],
    *,
    system: str | None = DEFAULT_SYSTEM,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[Span, ...]:
    """The spans of a conversation.

    Args:
        messages: checked messages (`parse_messages`).
        system: put in front if the conversation has no system message; None leaves it out.
        tools: tool definitions for the system turn, unless the system message has its own.
        add_generation_prompt: end with the head of an answer, unless there is an answer last.

    Raises:
        ConfigError: a default system text that is empty or has spaces around it.
        DataError: no messages; tools without a system message or given twice.
    """
    if not messages:
        raise DataError("no messages to render")
    messages = _with_system(messages, system)
    first = messages[0]
    if tools and first.role != "system":
        raise DataError(
            "tools need a system message",
            kind="wrong-tools",
            found=f"first role {first.role!r}",
            advice="Add a system message",
        )
    if tools and first.tools:
        raise DataError("tools are given twice", kind="wrong-tools", expected="as an argument or on the system message")
    spans: list[Span] = []
    for message in messages:
        role = message.role
        spans.append(_HEADS[role])
        body = _body(message, tools if message is first else None) + TURN_END
        spans.append(Span(body, message.loss_weight, role))
    if add_generation_prompt and messages[-1].role != ASSISTANT:
        spans.append(_HEADS[ASSISTANT])
    return tuple(spans)


def encode(spans: Sequence[Span], tokenizer: TurnEncoder) -> Encoded:
    """Ids of a rendered conversation and their loss weights.

    The text is encoded in one call, as the model was trained; turns are then found by the ids of
    their special tokens, which ordinary text cannot produce.

    Raises:
        DataError: a text contains a special token, so that there are other turns than were rendered.
    """
    ids = tokenizer.encode("".join(span.text for span in spans))
    assert ids[:1] == [tokenizer.prefix_id], "the dummy prefix is a token of its own before a turn"
    ids[0] = tokenizer.eos_id
    bodies = [span for span in spans if span.text.endswith(TURN_END)]
    places = list(_turns(ids, tokenizer))
    heads = len(spans) - len(bodies)
    starts, ends = ids.count(tokenizer.turn_start_id), ids.count(tokenizer.turn_end_id)
    if (starts, ends, len(places)) != (heads, len(bodies), len(bodies)):
        raise DataError(
            "a text contains the special token of a turn",
            kind="special-token",
            expected=f"{heads} times {TURN_START} and {len(bodies)} times {TURN_END}",
            found=f"{starts} and {ends}",
            advice="Check messages with parse_messages(..., special_pieces=tokenizer.special_pieces)",
        )
    weights = [0.0] * len(ids)
    for span, (_, body, stop) in zip(bodies, places, strict=True):
        weights[body:stop] = [span.weight] * (stop - body)
    return Encoded(ids, weights, tuple(Turn(span.role, *place) for span, place in zip(bodies, places, strict=True)))


def encode_text(text: str, tokenizer: TurnEncoder) -> Encoded:
    """Ids of plain text between two end-of-sequence tokens; all but the first are trained."""
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return Encoded(ids, [0.0, *[1.0] * (len(ids) - 1)])


def _turns(ids: list[int], tokenizer: TurnEncoder) -> Iterator[tuple[int, int, int]]:
    """Start, body and stop of each whole turn."""
    stop = 0
    with suppress(ValueError):  # no further turn
        while True:
            start = ids.index(tokenizer.turn_start_id, stop)
            body = ids.index(tokenizer.newline_id, start) + 1
            stop = ids.index(tokenizer.turn_end_id, body) + 1
            yield start, body, stop


def _with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    if system is None or messages[0].role == "system":
        return messages
    if not system or system != system.strip(" "):
        raise ConfigError(
            "the default system message cannot be used",
            expected="a text without spaces around it",
            found=repr(system),
            advice="Pass None to have no system message",
        )
    return (Message("system", system), *messages)


_HEADS = {role: Span(f"{TURN_START} {role}{NEWLINE}", 0.0, role) for role in ROLES}


def _body(message: Message, tools: Sequence[Mapping[str, Any]] | None) -> str:
    text = _content(message)
    if message.tool_calls:
        calls = [
            {"name": call["function"]["name"], "arguments": parse_arguments(call["function"]["arguments"])}
            for call in message.tool_calls
        ]
        text += f"{EXECUTABLE_START} ```function\n{to_json(calls)}```{EXECUTABLE_END}"
    if message.response_format is not None:
        text += _response_format(message.response_format["json_schema"])
    if definitions := tools or message.tools:
        text += f"{NEWLINE}system tools: " + NEWLINE.join(to_json(tool) for tool in definitions)
    return text


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if isinstance(message.content, dict):
        return to_json(message.content)
    return "new tools: " + "\n".join(to_json(tool) for tool in message.content)


def _response_format(schema: Mapping[str, Any]) -> str:
    lines = (
        "response format in json.",
        f"name: {schema.get('name')}",
        f"description: {schema.get('description')}",
        f"schema: {to_json(schema['schema'])}",
    )
    return "\n\n" + "\n".join(lines)
