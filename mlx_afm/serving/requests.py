"""OpenAI's requests, checked once and then trusted."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_afm.errors import AFMError, ConfigError
from mlx_afm.generation.config import GenerateConfig
from mlx_afm.generation.sampling import Sampler
from mlx_afm.serving.api_error import APIError
from mlx_afm.serving.config import ServeConfig
from mlx_afm.serving.fields import Fields, kind, shown
from mlx_afm.serving.prompts import Prompt, chat_prompt, text_prompts
from mlx_afm.text.template import DEFAULT_SYSTEM
from mlx_afm.text.tokenizer import AFMTokenizer, require_token_ids
from mlx_afm.text.values import present

MAX_STOPS, MAX_TOP_LOGPROBS, MAX_TOP_COMPLETION, MAX_SEED = 4, 20, 5, 2**63
LEAST_TOP_P = 1e-6  # what 0 means: the most likely token alone
IDLE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
SHARED = (
    *("model", "stream", "stream_options", "stop", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "logprobs", "frequency_penalty", "presence_penalty", "logit_bias", *IDLE),
)
CHAT = (
    *SHARED,
    *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    *("response_format", "modalities"),
)
TEXT = (*SHARED, "prompt", "echo", "suffix", "best_of")


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a request asks for.

    Attributes:
        chat: chat, or text to be continued.
        model: the id as it was sent.
        prompts: ids of each prompt; one for a chat.
        choices: answers to each.
        max_tokens: of an answer; None for what the server says and the context leaves.
        sampler: how to sample the first answer; each has its own.
        stops: strings that end an answer.
        stream, usage: events, and with the token counts at the end.
        tools: the model may call tools.
        one_call: and only one at a time; also of a tool that is called by name.
        schema: of the JSON that the answer must be.
        forced_tools: the answer must call one of them, as `tool_choice` wants; empty if it need not.
    """

    chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    choices: int
    max_tokens: int | None
    sampler: Sampler
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    tools: bool = False
    one_call: bool = False
    schema: Mapping[str, Any] | None = None
    forced_tools: tuple[Mapping[str, Any], ...] = ()


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

    def chat(self, values: Mapping[str, Any]) -> CompletionRequest:
        """A request of /v1/chat/completions.

        Raises:
            APIError: fields that cannot be used, all in one; messages that the model's template cannot render.
        """
        fields = Fields(values, CHAT)
        fields.only("modalities", ["text"])
        wanted = fields.whole("max_completion_tokens", 1, 2**31) or fields.whole("max_tokens", 1, 2**31)
        alternatives = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
        told = fields.flag("logprobs")
        if alternatives is not None and not told:
            fields.fault("top_logprobs", "expected logprobs to be true with it")
        tools = self._tools(fields)
        forced_tools = _must_call(fields, tools)
        schema = _schema(fields)
        if forced_tools and schema is not None:
            fields.fault("response_format", "an answer that must call a tool has no other form")
        shared = self._shared(fields, (alternatives or 0) if told else None)
        named = bool(forced_tools) and fields.value("tool_choice") != "required"
        one_call = not fields.flag("parallel_tool_calls", True) or named
        fields.done()
        try:
            system = self.system_prompt(shared["model"])
            prompt = chat_prompt(fields.value("messages"), tools, schema, self.tokenizer, system)
        except AFMError as error:
            raise _refused("messages", error) from error
        constraint = None if schema is None else schema["schema"]
        return CompletionRequest(
            chat=True,
            prompts=(prompt,),
            max_tokens=wanted,
            tools=bool(tools),
            one_call=one_call,
            schema=constraint,
            forced_tools=forced_tools,
            **shared,
        )

    def text(self, values: Mapping[str, Any]) -> CompletionRequest:
        """A request of /v1/completions.

        Raises:
            APIError: fields that cannot be used, all in one.
        """
        fields = Fields(values, TEXT)
        fields.only("echo", False)
        fields.only("suffix", "")
        fields.only("best_of", values.get("n") if isinstance(values.get("n"), int) else 1)
        wanted = fields.whole("max_tokens", 1, 2**31)
        shared = self._shared(fields, fields.whole("logprobs", 0, MAX_TOP_COMPLETION))
        try:
            prompts = text_prompts(fields.value("prompt"), self.tokenizer, self.vocabulary, self.config.rows)
        except AFMError as error:
            fields.fault("prompt", str(error))
        fields.done()
        return CompletionRequest(chat=False, prompts=prompts, max_tokens=wanted, **shared)

    def _shared(self, fields: Fields, top_logprobs: int | None) -> dict[str, Any]:
        model = fields.value("model")
        if not isinstance(model, str) or not model:
            fields.fault("model", f"expected the id of a model, found {kind(model)}")
        stream, usage = fields.flag("stream"), self._usage(fields)
        seed = fields.whole("seed", -MAX_SEED, MAX_SEED - 1)
        config = GenerateConfig(
            temp=fields.number("temperature", 0, 2, self.config.temperature),
            top_p=fields.number("top_p", 0, 1, 1.0) or LEAST_TOP_P,
            top_k=fields.whole("top_k", 0, self.vocabulary - 1, 0) or 0,
            min_p=fields.number("min_p", 0, 0.999, 0.0),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
        )
        sampler = Sampler(
            config=config,
            top_logprobs=top_logprobs,
            frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
            presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
            logit_bias=self._bias(fields),
        )
        return {
            "model": model,
            "choices": fields.whole("n", 1, self.config.rows, 1),
            "sampler": sampler,
            "stops": fields.texts("stop", MAX_STOPS),
            "stream": stream,
            "usage": stream and usage,
        }

    def _usage(self, fields: Fields) -> bool:
        options = fields.value("stream_options")
        if options is None:
            return False
        if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), (bool, type(None))):
            fields.fault("stream_options", 'expected {"include_usage": true or false}')
            return False
        if not fields.value("stream"):
            fields.fault("stream_options", "expected stream to be true with it")
        if unknown := set(options) - {"include_usage", "include_obfuscation"}:
            fields.fault("stream_options", f"expected include_usage, found {min(unknown)[:80]}")
        return bool(options.get("include_usage"))

    def _bias(self, fields: Fields) -> dict[int, float]:
        given = fields.value("logit_bias")
        if given is None:
            return {}
        if not isinstance(given, dict):
            fields.fault("logit_bias", f"expected an object of token ids and numbers, found {kind(given)}")
            return {}
        try:
            ids = require_token_ids(map(_as_id, given), self.vocabulary, where="keys")
        except ConfigError as error:
            fields.fault("logit_bias", str(error))
            return {}
        for token, value in zip(ids, given.values()):
            if type(value) not in (int, float) or not -100 <= value <= 100:
                fields.fault("logit_bias", f"token {token}: expected a number from -100 to 100, found {shown(value)}")
                return {}
        return {token: float(value) for token, value in zip(ids, given.values())}

    def _tools(self, fields: Fields) -> list[Any]:
        tools = fields.value("tools")
        if tools is None:
            return []
        good = isinstance(tools, list) and all(
            isinstance(tool, dict)
            and tool.get("type") == "function"
            and isinstance(tool.get("function"), dict)
            and isinstance(tool["function"].get("name"), str)
            for tool in tools
        )
        if not good:
            fields.fault("tools", 'expected a list of {"type": "function", "function": {"name": ..., ...}}')
            return []
        if fields.value("tool_choice") == "none":
            return []
        return [{**tool, "function": present(tool["function"])} for tool in map(present, tools)]


def _as_id(key: str) -> object:
    """The number that a key of a JSON object spells, as the API writes token ids; other keys as they are."""
    return int(key) if re.fullmatch(r"-?[0-9]{1,12}", key) else key


def _must_call(fields: Fields, tools: list[Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of which one must be called, by `tool_choice`."""
    choice = fields.value("tool_choice")
    if choice in (None, "none", "auto"):
        return ()
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = named.get("name") if isinstance(named, dict) else None
    if choice != "required" and not isinstance(name, str):
        one = '{"type": "function", "function": {"name": ...}}'
        fields.fault("tool_choice", f'expected "auto", "none", "required" or {one}')
        return ()
    wanted = tuple(tool for tool in tools if name is None or tool["function"]["name"] == name)
    if not wanted:
        fields.fault("tool_choice", "expected tools with it" if name is None else f"no tool is named {name[:80]!r}")
    return wanted


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The `json_schema` of a response format; that of any object for `json_object`."""
    wanted: Any = present(fields.value("response_format"))
    if wanted is None:
        return None
    form = wanted.get("type") if isinstance(wanted, dict) else None
    if form == "text" and len(wanted) == 1:
        return None
    if form == "json_object" and len(wanted) == 1:
        return {"name": None, "schema": {"type": "object"}}
    schema = wanted.get("json_schema") if form == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict) or not schema.get("name"):
        shape = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        fields.fault("response_format", f'expected type "text", "json_object", or {shape}')
        return None
    if not all(isinstance(schema.get(name, ""), (str, type(None))) for name in ("name", "description")):
        fields.fault("response_format", "expected name and description to be strings")
        return None
    return schema


def _refused(param: str, error: AFMError) -> APIError:
    if isinstance(error, APIError):
        return error
    return APIError(400, str(error), code="invalid_value", param=param)
