"""A conversation that goes on: its messages, and the keys and values of what the model has read of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlx_afm.errors import ConfigError, DataError
from mlx_afm.generation.config import GenerateConfig, require_fitting
from mlx_afm.generation.engine import Engine
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.generate import responses
from mlx_afm.generation.prefix_cache import PrefixCache
from mlx_afm.generation.prompts import to_prompt_ids
from mlx_afm.generation.rows import LENGTH, Request, Row
from mlx_afm.generation.speculation import Speculation, require_pair
from mlx_afm.generation.text_stream import TextStream
from mlx_afm.model import Model
from mlx_afm.text.messages import parse_messages
from mlx_afm.text.system_prompt import parse_system_prompt
from mlx_afm.text.template import DEFAULT_SYSTEM
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.text.tool_calls import parse_tool_calls

Ending = Literal["stop", "length", "context", "stopped"]


@dataclass(frozen=True, kw_only=True)
class ChatTurn:
    """What one question and its answer took.

    Attributes:
        prompt_tokens: of the whole conversation up to the answer.
        reused_tokens: of these, how many were known from before.
        generation_tokens: of the answer.
        finish_reason: `stop`, the model's own end; `length`, `max_tokens`; `context`, the conversation fills the
            model's context; `stopped`, someone did.
        kept: whether question and answer are in the conversation; a question without any answer is not.
        cleaned: whether special tokens that the answer contained as text were removed.
    """

    prompt_tokens: int
    reused_tokens: int
    generation_tokens: int
    finish_reason: Ending
    kept: bool
    cleaned: bool


class _Stopped(Exception):
    """Someone stopped it while the prompt was read."""


@dataclass(kw_only=True)
class Chat:
    """One conversation. What the model has read is kept, so each question costs what is new.

        chat = Chat(model=model, tokenizer=tokenizer, config=GenerateConfig(max_tokens=200))
        for response in chat.ask("Name a river."):
            show(response.text)

    Nothing is ever left out of the conversation: one that fills the context refuses the next question.

    Attributes:
        model, tokenizer: from `mlx_afm.load`. After a change of weights, `forget`.
        config: how to answer; each answer draws with another seed, counted from its own.
        system: the system prompt; "" for no system turn, None for the tokenizer's `system_prompt`.
        speculation: a draft model, if there is one.
        messages: the conversation so far, without the system message; as training data has it.
        last: what the last answer took; None before and while there is one.
    """

    model: Model
    tokenizer: AFMTokenizer
    config: GenerateConfig = field(default_factory=GenerateConfig)
    system: str | None = None
    speculation: Speculation | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: ChatTurn | None = None
    _prefixes: PrefixCache = field(default_factory=PrefixCache, repr=False)

    def __post_init__(self) -> None:
        require_fitting(self.config, self.model)
        if self.speculation is not None:
            require_pair(self.model, self.speculation.draft)
        self.forget()

    def forget(self) -> None:
        """Drops keys and values, which belong to the weights that made them; the conversation stays."""
        self._prefixes = PrefixCache()

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All messages, as a line of training data."""
        told = self.system_prompt if self.system is not None or self.tokenizer.system_prompt != DEFAULT_SYSTEM else None
        return [*([] if told is None else [{"role": "system", "content": told}]), *self.messages]

    @property
    def system_prompt(self) -> str | None:
        """The text of the system turn; None if there is none."""
        return self.tokenizer.system_prompt if self.system is None else parse_system_prompt(self.system)

    def ask(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Generator[Any, None, None]:
        """The answer, as `stream_generate` gives it; afterwards question and answer are in the conversation.

        Args:
            text: the user's.
            should_stop: asked after every piece of the prompt and every token. Leaving the iterator stops too.

        Raises:
            ConfigError: the conversation fills the context. DataError: a text that contains a special token.
                The conversation is then as it was.
        """
        self.last = None
        question = {"role": "user", "content": text}
        ids = to_prompt_ids(
            self.tokenizer, [*self.messages, question], system=self.system, vocabulary=self.model.args.vocab_size
        )
        max_tokens = self._answer_tokens(ids)
        engine, row = self._engine(ids, should_stop)
        pieces: list[str] = []
        reason: Ending = "stopped"
        answer = responses(engine, TextStream(self.tokenizer, self.config.stop), len(ids), should_stop)
        try:
            for response in answer:
                pieces.append(response.text)
                if response.finish_reason is not None:
                    reason = response.finish_reason
                yield response
        except _Stopped:
            pass
        finally:
            answer.close()
            if reason == LENGTH and max_tokens < self.config.max_tokens:
                reason = "context"
            kept, cleaned = self._add(question, "".join(pieces), reason)
            self.last = ChatTurn(
                prompt_tokens=len(ids),
                reused_tokens=row.cached_tokens,
                generation_tokens=len(row.tokens),
                finish_reason=reason,
                kept=kept,
                cleaned=cleaned,
            )

    def _answer_tokens(self, ids: list[int]) -> int:
        try:
            return self.config.answer_tokens(len(ids))
        except ConfigError as error:
            advice = "Nothing is left out of it: begin a new one."
            what = "the conversation fills the model's context"
            raise ConfigError(what, expected=error.expected, found=error.found, advice=advice) from error

    def _engine(self, ids: list[int], should_stop: Callable[[], bool]) -> tuple[Engine, Row]:
        """An engine with one row, which goes on from what the model has read of the conversation."""

        def progress(done: int, total: int) -> None:
            if should_stop():
                raise _Stopped

        held = decoder_of(self.model)
        engine = Engine(
            held.decoder,
            prefix_cache=self._prefixes,
            routes=held.routes,
            keep_answers=True,
            speculation=self.speculation,
        )
        config = replace(self.config, seed=(self.config.seed + len(self.messages)) % 2**64)
        ends = frozenset(self.tokenizer.eos_token_ids)
        (row,) = engine.add(Request(ids=ids, config=config, stop_token_ids=ends, on_progress=progress))
        return engine, row

    def _add(self, question: dict[str, Any], said: str, reason: Ending) -> tuple[bool, bool]:
        """Adds both to the conversation; whether it did, and whether special tokens were removed from the answer."""
        if not said and reason != "stop":
            return False, False
        content, calls = parse_tool_calls(said)
        answer: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            answer["tool_calls"] = [{"function": call["function"]} for call in calls]
        cleaned = not self._can_be_said(question, answer)
        if cleaned:
            answer = {"role": "assistant", "content": _without(said, (*self.tokenizer.special_pieces, "\0"))}
        self.messages += [question, answer]
        return True, cleaned

    def _can_be_said(self, *messages: dict[str, Any]) -> bool:
        try:
            parse_messages(messages, where="chat", special_pieces=self.tokenizer.special_pieces)
        except DataError:
            return False
        return True


def _without(text: str, pieces: Sequence[str]) -> str:
    """The text without these pieces, nor any that come about when some are taken out."""
    while any(piece in text for piece in pieces):
        for piece in pieces:
            text = text.replace(piece, "")
    return text
