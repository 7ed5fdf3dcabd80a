"""Requests for completions: bodies, checked by their models, to what is generated."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_afm.errors import AFMError, ConfigError, DataError
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.prompts import EncodedPrompt, encode_conversation
from mlx_afm.generation.sampling import Sampler
from mlx_afm.serving.api_error import APIError, invalid_fields, kind
from mlx_afm.serving.bodies import (
    ChatBody,
    Completion,
    NamedTool,
    ObjectFormat,
    ResponseFormat,
    Sampling,
    SchemaFormat,
    TextBody,
    Tool,
    ToolChoice,
)
from mlx_afm.serving.config import ServeConfig
from mlx_afm.text.response_format import response_format
from mlx_afm.text.template import DEFAULT_SYSTEM
from mlx_afm.text.tokenizer import AFMTokenizer, require_token_ids
from mlx_afm.text.values import present

LEAST_TOP_P = 1e-6  # what 0 means: the most likely token alone
Fault = tuple[str, str]  # the path of a field, and what is wrong with it


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a request asks for.

    Attributes:
        model: the id as it was sent.
        prompts: ids of each prompt; one for a chat.
        sampler: how to sample the first answer; each has its own.
        stream, usage: events, and with the token counts at the end.
        choices: answers to each prompt.
        max_tokens: of an answer; None for the server's default, `NO_LIMIT` for what the context leaves.
        stops: strings that end an answer.
        chat: the special tokens of tool calls are not part of the text.
        tools: the model may call tools.
        one_call: and only one at a time; also of a tool that is called by name.
        schema: of the JSON that the answer must be.
        forced_tools: the answer must call one of them, as `tool_choice` wants; empty if it need not.
        echo: the prompt is part of the text, and of the log probabilities.
    """

    model: str
    prompts: tuple[EncodedPrompt, ...]
    sampler: Sampler
    stream: bool
    usage: bool = False
    choices: int = 1
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    chat: bool = True
    tools: bool = False
    one_call: bool = False
    schema: Mapping[str, Any] | None = None
    forced_tools: tuple[Mapping[str, Any], ...] = ()
    echo: bool = False


@dataclass(frozen=True)
class Reader:
    """Reads requests.

    Args:
        tokenizer: the model's.
        config: defaults and limits.
        vocabulary: how many ids there are.
        system_prompt: of conversations without a system message, by model id.
    """

    tokenizer: AFMTokenizer
    config: ServeConfig
    vocabulary: int
    system_prompt: Callable[[str], str | None] = lambda model: DEFAULT_SYSTEM

    def chat(self, body: ChatBody) -> CompletionRequest:
        """A request of /v1/chat/completions.

        Raises:
            APIError: fields that cannot be used, all in one; messages that the model's template cannot render.
        """
        faults = self._shared_faults(body)
        if body.top_logprobs is not None and not body.logprobs:
            faults.append(("top_logprobs", "expected logprobs to be true with it"))
        faults += [
            (name, "expected -1 or at least 1, found 0")
            for name in ("max_tokens", "max_completion_tokens")
            if getattr(body, name) == 0
        ]
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        fields = {**self._completion(body, top_logprobs), "max_tokens": wanted}
        return self.conversation(
            [message.plain() for message in body.messages],
            tools=body.tools or [],
            tool_choice=body.tool_choice,
            parallel=body.parallel_tool_calls is not False,
            form=body.response_format,
            faults=faults,
            fields=fields,
        )

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool],
        tool_choice: ToolChoice | None,
        parallel: bool,
        form: ResponseFormat | None,
        faults: list[Fault],
        fields: dict[str, Any],
    ) -> CompletionRequest:
        """A request for an answer in a conversation, whichever endpoint it came to.

        Args:
            messages: as `parse_messages` reads them.
            tools, tool_choice, parallel, form: what the answer may and must be.
            faults: found so far; more are added.
            fields: of the `CompletionRequest` besides.

        Raises:
            APIError: as `chat`.
        """
        named = tool_choice.function.name if isinstance(tool_choice, NamedTool) else None
        definitions = [] if tool_choice == "none" else [definition(tool) for tool in tools]
        forced: tuple[Mapping[str, Any], ...] = ()
        if named is not None or tool_choice == "required":
            forced = tuple(tool for tool in definitions if named is None or tool["function"]["name"] == named)
            if not forced:
                what = "expected tools with it" if named is None else f"no tool is named {named[:80]!r}"
                faults.append(("tool_choice", what))
            if isinstance(form, (ObjectFormat, SchemaFormat)):
                faults.append(("response_format", "an answer that must call a tool has no other form"))
        if faults:
            raise invalid_fields(faults)
        if isinstance(form, SchemaFormat):
            messages = _with_format(messages, form)
        return CompletionRequest(
            prompts=(self.prompt(fields["model"], messages, definitions),),
            tools=bool(definitions),
            one_call=named is not None or not parallel,
            schema=_schema(form),
            forced_tools=forced,
            **fields,
        )

    def prompt(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> EncodedPrompt:
        """The prompt of a conversation with a model id.

        Raises:
            APIError: the model's template cannot render it.
        """
        system, joins_turns = self.system_prompt(model), not self.config.strict_turns
        try:
            return encode_conversation(self.tokenizer, messages, tools, system=system, joins_turns=joins_turns)
        except AFMError as error:
            raise APIError(400, str(error), code="invalid_value", param="messages") from error

    def text(self, body: TextBody) -> CompletionRequest:
        """A request of /v1/completions.

        Raises:
            APIError: fields that cannot be used, all in one.
        """
        faults, prompts = self._shared_faults(body), tuple[EncodedPrompt, ...]()
        if body.best_of not in (None, body.n or 1):
            faults.append(("best_of", f"expected {body.n or 1}, as many as n, found {body.best_of}"))
        if body.max_tokens == 0 and not body.echo:
            faults.append(("max_tokens", "expected -1 or at least 1 without echo, found 0"))
        try:
            prompts = self._prompts(body.prompt)
        except (ConfigError, DataError) as error:
            faults.append(("prompt", str(error)))
        fields = self._completion(body, body.logprobs)
        if faults:
            raise invalid_fields(faults)
        return CompletionRequest(
            chat=False, prompts=prompts, max_tokens=body.max_tokens, echo=bool(body.echo), **fields
        )

    def sampler(self, body: Sampling, top_logprobs: int | None = None, **more: Any) -> Sampler:
        """How a body wants its first answer to be sampled."""
        temperature = self.config.temperature if body.temperature is None else body.temperature
        config = GenerateConfig(
            temp=float(temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p) or LEAST_TOP_P,
            top_k=max(body.top_k or 0, 0),
            min_p=float(body.min_p or 0),
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        )
        return Sampler(config=config, top_logprobs=top_logprobs, **more)

    def sampling_faults(self, body: Sampling) -> list[Fault]:
        """What this model cannot do, though the field's type allows it."""
        if (body.top_k or 0) < self.vocabulary:
            return []
        return [("top_k", f"expected at most {self.vocabulary - 1}, found {body.top_k}")]

    def _shared_faults(self, body: Completion) -> list[Fault]:
        faults = self.sampling_faults(body)
        if (body.n or 1) > self.config.rows:
            faults.append(("n", f"expected at most {self.config.rows}, found {body.n}"))
        if body.stream_options is not None and not body.stream:
            faults.append(("stream_options", "expected stream to be true with it"))
        try:
            require_token_ids(map(_as_id, body.logit_bias or {}), self.vocabulary, where="keys")
        except ConfigError as error:
            faults.append(("logit_bias", str(error)))
        return faults

    def _completion(self, body: Completion, top_logprobs: int | None) -> dict[str, Any]:
        """Fields of the `CompletionRequest` that chat and text share."""
        bias = {} if body.logit_bias is None else {_as_id(key): float(v) for key, v in body.logit_bias.items()}
        sampler = self.sampler(
            body,
            top_logprobs,
            frequency_penalty=float(body.frequency_penalty or 0),
            presence_penalty=float(body.presence_penalty or 0),
            logit_bias=bias,
        )
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return {
            "model": body.model,
            "choices": body.n or 1,
            "sampler": sampler,
            "stops": tuple(body.stop or ()),
            "stream": bool(body.stream),
            "usage": usage,
        }

    def _prompts(self, prompt: Any) -> tuple[EncodedPrompt, ...]:
        """Prompts of text to be continued: a string, a list of ids, or a list of either."""
        several: list[Any] = [prompt]
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            several = prompt
        if len(several) > self.config.rows:
            expected = f"at most {self.config.rows}"
            raise DataError("too many prompts in one request", expected=expected, found=len(several))
        places = ["prompt"] if several == [prompt] else [f"prompt {number}" for number in range(len(several))]
        return tuple(
            EncodedPrompt(self._text_ids(item, where), text=item if isinstance(item, str) else None)
            for item, where in zip(several, places)
        )

    def _text_ids(self, prompt: object, where: str) -> list[int]:
        if isinstance(prompt, str) and prompt:
            return [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]
        if isinstance(prompt, list) and prompt and all(isinstance(item, (int, float)) for item in prompt):
            return require_token_ids(prompt, self.vocabulary, where=where)
        expected = f"text, or token ids from 0 to {self.vocabulary - 1}"
        raise DataError("not a prompt", where=where, expected=expected, found=kind(prompt))


def _as_id(key: str) -> Any:
    """The number that a key of a JSON object spells, as the API writes token ids; other keys as they are."""
    return int(key) if re.fullmatch(r"-?[0-9]{1,12}", key) else key


def definition(tool: Tool) -> dict[str, Any]:
    """A tool of the API as the model's template writes it: as it came, without nulls."""
    given = present(tool.given)
    return {**given, "function": present(given["function"])}


def _schema(form: ResponseFormat | None) -> Mapping[str, Any] | None:
    """The JSON schema that a response format holds the answer to."""
    if isinstance(form, ObjectFormat):
        return {"type": "object"} if form.schema_ is None else form.schema_
    return form.json_schema.schema_ if isinstance(form, SchemaFormat) else None


def _with_format(messages: Sequence[Mapping[str, Any]], form: SchemaFormat) -> list[Mapping[str, Any]]:
    """Messages of which the last one that is answered holds the response format; system messages go to the front."""
    answered = [place for place, message in enumerate(messages) if message["role"] not in ("system", "developer")]
    asked = {place: {**messages[place], "response_format": _template_format(form)} for place in answered[-1:]}
    return [asked.get(place, message) for place, message in enumerate(messages)]


def _template_format(form: SchemaFormat) -> dict[str, Any]:
    """A response format as the model's template writes it into the prompt."""
    given = form.json_schema
    try:
        return response_format(given.schema_, name=given.name, description=given.description)
    except ConfigError:  # not an object's: written as it came
        described = present({"name": given.name, "description": given.description, "schema": given.schema_})
        return {"type": "json_schema", "json_schema": {**described, "strict": "true"}}
