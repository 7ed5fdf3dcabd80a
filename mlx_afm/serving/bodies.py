"""Request bodies: the fields that there are, with their types and ranges. null means absent everywhere.

`Literal[None]` fields exist so that a client may send back what it was given; a value in them would change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

NO_LIMIT = -1
ADAPTER_NAME = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(min_length=1)]
Object = dict[str, Any]
AnswerTokens = Annotated[int, Field(ge=NO_LIMIT, le=2**31, description="-1: as many as the context leaves")]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}),
]
# A text, or parts of one; `parse_messages` reads it, as in training data.
Content = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]})]

# A text, a list of ids, or a list of either; the reader of requests looks closer.
_IDS = {"type": "array", "items": {"type": "integer"}}
_TEXTS = {"type": "array", "items": {"type": "string"}}
Prompts = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]})
]


class Body(BaseModel):
    """An object without other fields than these, and without conversions: "8" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Given(Body):
    """An object that is passed on exactly as it came, with its own order of keys and fields of other vendors."""

    model_config = ConfigDict(extra="allow", strict=True)
    _given: Object = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        made = handler(value)
        made._given = value
        return made

    @property
    def given(self) -> Object:
        """The object."""
        return self._given


class Function(Given):
    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Given):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class CalledFunction(Body):
    name: str
    arguments: str | Object
    parsed_arguments: Any = None  # of the `openai` package's helpers


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None  # of a stream
    function: CalledFunction


class ChatMessage(Body):
    """A message, with the fields of answers that clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    index: int | None = None
    audio: Literal[None] = None
    function_call: Literal[None] = None

    def plain(self) -> Object:
        """The message without what the model's template has no place for."""
        fields = {"role": self.role, "content": self.content, "tool_call_id": self.tool_call_id}
        if self.role != "tool":
            del fields["tool_call_id"]
        if self.tool_calls is None:
            return fields
        calls = [{"name": call.function.name, "arguments": call.function.arguments} for call in self.tool_calls]
        return {**fields, "tool_calls": [{"type": "function", "function": function} for function in calls]}


class NamedSchema(Body):
    name: Name
    description: str | None = None
    schema_: Object = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]
    json_schema: Literal[None] = None


class ObjectFormat(Body):
    """Any JSON object, or one of a schema, as in llama.cpp."""

    type: Literal["json_object"]
    schema_: Object | None = Field(None, alias="schema")


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """What every kind of completion has."""

    model: Name
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=NO_LIMIT, description="-1 and 0: no limit")] | None = None
    min_p: Annotated[float, Field(ge=0, le=0.999)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # Without effect here.
    user: str | None = None
    metadata: Object | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Completion(Sampling):
    stream_options: StreamOptions | None = None
    max_tokens: AnswerTokens | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stops | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    store: bool | None = None  # without effect


class ChatBody(Completion):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: AnswerTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


class TextBody(Completion):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Literal["", None] = None
    best_of: int | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation as chat completions read it."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True, None] = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: list[int]


class AdapterBody(Body):
    """POST /admin/adapters."""

    name: Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$")]
    path: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$")]
    lora_path: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


# The Responses API.


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_TEXT_OR_LIST = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], BeforeValidator(_as_parts), _TEXT_OR_LIST
]


class MessageItem(Body):
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str
    id: str | None = None
    status: str | None = None
    namespace: Literal[None] = None
    parsed_arguments: Any = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    id: str | None = None
    status: str | None = None


class ReasoningItem(Given):
    """Another model's; the template has no place for it."""

    type: Literal["reasoning"]


def _with_type(item: Any) -> Any:
    return {"type": "message", **item} if isinstance(item, dict) and "role" in item else item


InputItem = Annotated[
    Annotated[MessageItem | CallItem | CallOutputItem | ReasoningItem, Field(discriminator="type")],
    BeforeValidator(_with_type),
]


class FlatTool(Function):
    """A tool as the Responses API writes it."""

    type: Literal["function"]


class FlatNamedTool(FunctionName):
    type: Literal["function"]


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium", None] = None


class ResponsesBody(Sampling):
    """POST /v1/responses; nothing is stored, so `store` may only be false."""

    input: Annotated[list[InputItem], Field(min_length=1), BeforeValidator(_as_items), _TEXT_OR_LIST]
    instructions: str | None = None
    max_output_tokens: AnswerTokens | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Literal[False, None] = None
    background: Literal[False, None] = None
    truncation: Literal["disabled", None] = None
    stream_options: StreamOptions | None = None
    previous_response_id: Literal[None] = None
    conversation: Literal[None] = None
    prompt: Literal[None] = None
    reasoning: Literal[None] = None
    max_tool_calls: Literal[None] = None
