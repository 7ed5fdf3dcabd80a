"""POST /v1/responses with the `openai` client, and clients' own objects sent back."""

import json

import openai
import pydantic
import pytest

from serving_client import REQUESTS, SYSTEM, chat

TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CHAT_TOOL = {"type": "function", "function": {key: value for key, value in TOOL.items() if key != "type"}}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    old: bool


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def respond(client):
    def create(text=REQUESTS[0], model="base", **settings):
        return client.responses.create(model=model, instructions=SYSTEM, input=text, **settings)

    return create


@pytest.mark.parametrize("model", ["base", "whole", "small", "dora"])
def test_an_answer_is_what_generate_says(model, respond, alone):
    answer = respond(model=model, max_output_tokens=48)
    assert answer.output_text == alone(model, REQUESTS[0], max_tokens=48)
    status = "completed" if answer.usage.output_tokens < 48 else "incomplete"
    assert (answer.status, answer.store, answer.model, answer.output[0].role) == (
        status,
        False,
        model,
        "assistant",
    )
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_an_answer_that_is_cut(respond):
    answer = respond(max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 3
    assert answer.output[0].status == "incomplete"


def test_a_stream_has_the_events_that_openai_documents(respond):
    events = list(respond(stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text == respond().output_text
    assert events[0].response.status == "in_progress"
    assert events[-1].response.usage.output_tokens > 0


def test_the_clients_own_stream_helper(client):
    with client.responses.stream(model="base", instructions=SYSTEM, input=REQUESTS[0]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text


def test_tools_are_called_and_their_results_read(client, respond):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    first = respond(
        "weather in oslo", tools=[TOOL], tool_choice="required", max_output_tokens=80, parallel_tool_calls=False
    )
    (call,) = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
    events = list(
        respond("weather in oslo", tools=[TOOL], tool_choice={"type": "function", "name": "weather"}, stream=True)
    )
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments) for event in done] == [{"city": "Oslo"}]
    assert events[-1].response.output[-1].call_id
    conversation = [{"role": "user", "content": "weather in oslo"}, *first.output]
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "-3"})
    second = client.responses.create(model="base", input=conversation, tools=[TOOL], max_output_tokens=4)
    messages = [
        {"role": "user", "content": "weather in oslo"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": "weather", "arguments": call.arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "-3"},
    ]
    same = client.chat.completions.create(model="base", messages=messages, tools=[CHAT_TOOL], max_tokens=4)
    assert (second.usage.input_tokens, second.output_text) == (
        same.usage.prompt_tokens,
        same.choices[0].message.content,
    )


def test_an_answer_is_held_to_a_schema(client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    parsed = client.responses.parse(model="base", input="who is it", text_format=Person, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Person)
    free = client.responses.create(
        model="base", input="who is it", text={"format": {"type": "json_object"}}, max_output_tokens=40
    )
    assert free.output_text.startswith("{")


def test_log_probabilities(respond, client):
    answer = respond(include=["message.output_text.logprobs"], top_logprobs=2)
    told = answer.output[0].content[0].logprobs
    whole = client.chat.completions.create(model="base", messages=chat(REQUESTS[0]), logprobs=True, top_logprobs=2)
    assert [token.token for token in told] == [token.token for token in whole.choices[0].logprobs.content]
    assert [token.logprob for token in told] == [token.logprob for token in whole.choices[0].logprobs.content]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"store": True}, "store: expected false"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected -1 or at least 1"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type"),
        ({"tool_choice": "required"}, "tool_choice: expected tools with it"),
        ({"top_logprobs": 2}, "top_logprobs: expected include"),
        ({"extra_body": {"max_tokens": 3}}, "max_tokens: not a field of this request"),
        (
            {"extra_body": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}},
            r"input\[0\].content\[0\]",
        ),
        ({"extra_body": {"input": [{"type": "item_reference", "id": "x"}]}}, r"input\[0\]"),
        ({"extra_body": {"input": []}}, "input: list should have at least 1 item"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(settings, says, respond):
    with pytest.raises(openai.BadRequestError, match=says):
        respond(**settings)


# Clients' own objects.


def test_an_answer_of_the_responses_api_is_accepted_again(client, respond):
    first = respond()
    turns = [{"role": "user", "content": REQUESTS[0]}, *first.output, {"role": "user", "content": REQUESTS[1]}]
    assert respond(turns, max_output_tokens=2).usage.input_tokens > first.usage.input_tokens
    stored = [json.loads(item.model_dump_json()) for item in first.output]
    stored.append({"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"})
    assert respond([*stored, {"role": "user", "content": "x"}], max_output_tokens=2).output


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_messages_of_answers_and_streams_are_accepted_again(client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    asked, settings = (
        chat("weather in oslo"),
        {
            "tools": [{**CHAT_TOOL, "function": {**CHAT_TOOL["function"], "strict": True}}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    )
    create = client.chat.completions.create
    whole = create(model="base", messages=asked, max_tokens=300, **settings).choices[0].message
    chunks = create(model="base", messages=asked, max_tokens=80, stream=True, **settings)
    deltas = [call.model_dump() for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0]["index"] == 0
    parsed = client.chat.completions.parse(model="base", messages=asked, max_tokens=300, **settings).choices[0].message
    with client.chat.completions.stream(model="base", messages=asked, max_tokens=300, **settings) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message
    vendors = {**whole.model_dump(), "reasoning_content": None, "annotations": [], "audio": None, "refusal": None}
    sizes = set()
    for message in (whole, parsed, streamed, whole.model_dump(), parsed.model_dump(), streamed.model_dump(), vendors,
                    {"role": "assistant", "content": None, "tool_calls": deltas}):  # fmt: skip
        again = [*asked, message, {"role": "tool", "tool_call_id": "x", "content": "-3"}]
        sizes.add(create(model="base", messages=again, tools=settings["tools"], max_tokens=2).usage.prompt_tokens)
    assert len(sizes) == 1, sizes


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_parsed_answer_is_accepted_again(client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    asked = chat("who is it")
    first = client.chat.completions.parse(model="base", messages=asked, response_format=Person, max_tokens=100)
    message = first.choices[0].message
    assert isinstance(message.parsed, Person)
    for given in (message, message.model_dump()):
        again = [*asked, given, {"role": "user", "content": "and now"}]
        assert client.chat.completions.create(model="base", messages=again, max_tokens=2).choices


def test_turns_in_a_row_are_joined(client, model_folder):
    from mlx_afm.serving import ServeConfig, running

    def tokens(messages, of=client):
        return of.chat.completions.create(model="base", messages=messages, max_tokens=1).usage.prompt_tokens

    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    system = lambda text: {"role": "system", "content": text}  # noqa: E731
    said = {"role": "assistant", "content": "b"}
    same = [
        ([user("a"), user("c")], [user("a\n\nc")]),
        ([user([{"type": "text", "text": "a"}]), user("c")], [user("a\n\nc")]),
        ([user("a"), said, said, user("c")], [user("a"), {**said, "content": "b\n\nb"}, user("c")]),
        ([system("s"), user("a"), system("t"), user("c")], [system("s\n\nt"), user("a\n\nc")]),
        (
            [user("a"), said, {"role": "developer", "content": "t"}, user("c")],
            [system("t"), user("a"), said, user("c")],
        ),
        ([user("a"), system("t")], [system("t"), user("a")]),
    ]
    for given, joined in same:
        assert tokens(given) == tokens(joined), given
    config = ServeConfig(port=0, model_id="base", strict_turns=True)
    with (
        running(model_folder, {}, config) as strict,
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="x", max_retries=0) as own,
    ):
        for given, joined in same:
            assert tokens(joined, own)
            with pytest.raises(openai.BadRequestError, match=r"in a row|only be the first|system message"):
                tokens(given, own)


def test_a_schema_stays_with_the_question_when_a_system_message_comes_late(client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    form = {"type": "json_schema", "json_schema": {"name": "Person", "schema": Person.model_json_schema()}}
    question, system = {"role": "user", "content": "who is it"}, {"role": "system", "content": "s"}
    counts = {
        client.chat.completions.create(
            model="base", messages=messages, response_format=form, max_tokens=1, logprobs=True
        )
        .choices[0]
        .logprobs.content[0]
        .logprob
        for messages in ([system, question], [question, system])
    }
    assert len(counts) == 1, "one prompt"


def test_no_limit(client):
    ask = client.chat.completions.create
    free = {"logit_bias": {"2": -100, "4": -100}}
    whole = ask(model="base", messages=chat(REQUESTS[0]), extra_body={"max_tokens": -1, "top_k": -1}, **free)
    assert whole.usage.total_tokens == 4096
    assert whole.choices[0].finish_reason == "length"


def test_an_object_of_a_schema_as_llama_cpp_has_it(client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    form = {"type": "json_object", "schema": Person.model_json_schema()}
    answer = client.chat.completions.create(
        model="base", messages=chat("who"), max_tokens=100, extra_body={"response_format": form}
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "old"}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "(?<=a)b"}, r"pattern '\(\?<=a\)b': look-around, .*is not supported"),
        ({"type": "string", "pattern": "a(" + "b" * 300}, r"pattern 'a\(b{300}': unclosed group"),
        ({"type": "array", "uniqueItems": True}, r"Unimplemented keys: .*uniqueItems"),
    ],
    ids=["look-around", "unclosed", "uniqueItems"],
)
def test_a_schema_that_cannot_be_used_says_why_whole(schema, says, client):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": schema}}},
    }
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(model="base", messages=chat("who"), response_format=form)
