"""The real `openai` client against a running server."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.generation import to_prompt_ids
from mlx_afm.serving import ServeConfig, running
from serving_client import REQUESTS, SYSTEM, chat

openai = pytest.importorskip("openai", reason="needs the openai library (dev extra)")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SMALL = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
SMALL_TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {**SMALL, "additionalProperties": False}},
}
CITIES = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def ask(client):
    def create(text=REQUESTS[0], model="base", **settings):
        return client.chat.completions.create(model=model, messages=chat(text), **settings)

    return create


def test_models_are_the_base_and_every_adapter(client, server):
    models = client.models.list().data
    assert [model.id for model in models] == ["base", "whole", "small", "some", "dora"] == list(server.models)
    assert client.models.retrieve("dora").id == "dora"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("poet")


@pytest.mark.parametrize("model", ["base", "whole", "small", "some", "dora"])
def test_an_answer_is_what_generate_says(model, ask, alone):
    for text in REQUESTS[:3]:
        answer = ask(text, model, max_tokens=24).choices[0]
        assert answer.message.content == alone(model, text, max_tokens=24)
        assert answer.message.role == "assistant"
        assert answer.message.tool_calls is None


def test_counts_and_reasons(ask, model_folder):
    _, tokenizer = mlx_afm.load(model_folder)
    whole, cut = ask(), ask(max_tokens=3)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == len(to_prompt_ids(tokenizer, chat(REQUESTS[0])))
    said = tokenizer.encode("\n" + whole.choices[0].message.content)
    assert whole.usage.completion_tokens == len(said) - 1  # less prefix and newline, and the end's mark
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)


def test_a_stream_is_the_same_answer(ask):
    whole = ask()
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert len(chunks) > 5
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in ask(stream=True))


@pytest.mark.parametrize("stop", [".go", [" zasu", "never"], ["o", "e."]], ids=str)
def test_stop_strings_end_the_answer_and_are_not_in_it(stop, ask):
    whole = ask().choices[0].message.content
    first = min(whole.find(text) for text in ([stop] if isinstance(stop, str) else stop) if text in whole)
    answer = ask(stop=stop).choices[0]
    assert (answer.message.content, answer.finish_reason) == (whole[:first], "stop")
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(stop=stop, stream=True))
    assert streamed == whole[:first]


def test_several_choices(ask, alone):
    greedy = ask(n=3)
    assert [c.index for c in greedy.choices] == [0, 1, 2]
    assert {c.message.content for c in greedy.choices} == {alone("base", REQUESTS[0])}
    sampled = ask(n=4, temperature=1.9, seed=1, max_tokens=12)
    assert len({c.message.content for c in sampled.choices}) > 1
    pieces = {}
    for chunk in ask(n=4, temperature=1.9, seed=1, max_tokens=12, stream=True):
        (choice,) = chunk.choices
        pieces[choice.index] = pieces.get(choice.index, "") + (choice.delta.content or "")
    assert [pieces[index] for index in range(4)] == [c.message.content for c in sampled.choices]


def test_a_seed_repeats_a_sample_as_generate_draws_it(ask, alone):
    settings = {"max_tokens": 16, "seed": 5}
    first = ask(temperature=1.8, top_p=0.95, **settings).choices[0].message.content
    assert ask(temperature=1.8, top_p=0.95, **settings).choices[0].message.content == first
    assert first == alone("base", REQUESTS[0], temp=1.8, top_p=0.95, **settings)
    others = {ask(temperature=1.8, max_tokens=16).choices[0].message.content for _ in range(16)}
    assert len(others) > 1  # without a seed each is another


def test_log_probabilities_are_the_models(ask, model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    answer = ask(logprobs=True, top_logprobs=3).choices[0]
    told = answer.logprobs.content
    assert "".join(token.token for token in told) == answer.message.content
    assert bytes(b for token in told for b in token.bytes).decode() == answer.message.content
    ids = to_prompt_ids(tokenizer, chat(REQUESTS[0]))
    for token in told:
        logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
        expected = (logits - mx.logsumexp(logits)).tolist()
        best = sorted(range(len(expected)), key=lambda i: -expected[i])[:3]
        assert [t.logprob for t in token.top_logprobs] == pytest.approx([expected[i] for i in best], abs=1e-4)
        assert (token.logprob, token.token) == (token.top_logprobs[0].logprob, token.top_logprobs[0].token)
        ids.append(best[0])
    streamed = [
        t
        for c in ask(logprobs=True, stream=True)
        for t in (c.choices[0].logprobs or told[:0] or []) and c.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in told]
    assert all(t.top_logprobs == [] for t in streamed)


def test_penalties_and_bias_change_the_choice(ask):
    plain = ask(logprobs=True).choices[0]
    assert ask(logit_bias={}).choices[0].message.content == plain.message.content
    assert ask(frequency_penalty=2.0, presence_penalty=2.0, temperature=0).choices[0].message.content
    answer = ask(logit_bias={"300": 100}, max_tokens=4, logprobs=True).choices[0]
    assert len({token.token for token in answer.logprobs.content}) == 1
    assert all(token.logprob < -1 for token in answer.logprobs.content)  # as the model had it
    biased = {"logit_bias": {"300": 30}, "max_tokens": 20, "logprobs": True}
    for penalty, expected in (("frequency_penalty", True), ("presence_penalty", False)):
        other = ask(**{penalty: 2.0}, **biased).choices[0]
        assert (len({token.token for token in other.logprobs.content}) > 1) == expected  # 2 each time, or 2 once


def test_an_answer_is_held_to_a_schema(ask):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    form = {"type": "json_schema", "json_schema": {"name": "Person", "schema": SCHEMA}}
    answer = ask("who is it", response_format=form, max_tokens=100).choices[0]
    assert answer.finish_reason == "stop"
    value = json.loads(answer.message.content)
    assert set(value) == {"name", "old"}
    assert isinstance(value["old"], bool)
    assert (
        ask("who is it", response_format={"type": "text"}).choices[0].message.content
        == ask("who is it").choices[0].message.content
    )
    both = ask("who is it", response_format=form, max_tokens=100, n=2, temperature=1.5, seed=1)
    assert all(set(json.loads(c.message.content)) == {"name", "old"} for c in both.choices)


def test_an_answer_that_cannot_keep_its_form_ends_alone(model_folder, monkeypatch):
    """A processor that fails in the middle of an answer takes no other answer of its batch with it."""
    from mlx_afm.serving import plan

    def constraint_of(asked, tokenizer):
        def process(history, logits):
            if len(history) == len(asked.prompts[0].ids) + 3:
                raise ValueError("the form is broken")
            return logits

        return None if asked.schema is None else lambda: process

    monkeypatch.setattr(plan, "constraint_of", constraint_of)
    told, form = [], {"type": "json_schema", "json_schema": {"name": "Person", "schema": SCHEMA}}
    with (
        running(model_folder, {}, ServeConfig(port=0, model_id="base"), told.append) as own,
        openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(6) as pool,
    ):

        def ask(number):
            create = client.chat.completions.create
            settings = {"response_format": form} if number % 3 == 0 else {}
            settings |= {"logit_bias": {"2": -100, "4": -100}, "max_tokens": 30}  # it does not end by itself
            try:
                return create(model="base", messages=chat(REQUESTS[0]), **settings).usage.completion_tokens
            except openai.InternalServerError as error:
                return str(error)

        answers = list(pool.map(ask, range(12)))
    for number, answer in enumerate(answers):
        assert "the form is broken" in answer if number % 3 == 0 else answer == 30
    assert len(told) == 4


def test_a_fault_of_the_server_is_told_as_one(model_folder, monkeypatch):
    told = []
    with (
        running(model_folder, {}, ServeConfig(port=0, model_id="base"), told.append) as own,
        openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(own.model, "submit", None)
            with pytest.raises(openai.InternalServerError, match="the server could not answer"):
                client.chat.completions.create(model="base", messages=chat(REQUESTS[0]))
        assert client.chat.completions.create(model="base", messages=chat(REQUESTS[0])).choices
    (line,) = told
    assert line.startswith("POST /v1/chat/completions: TypeError")


def test_any_json_object(ask):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    answer = ask("who is it", response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


def test_tools_and_their_results_reach_the_prompt(client, ask):
    plain = ask().usage.prompt_tokens
    assert ask(tools=[TOOL]).usage.prompt_tokens > plain + 20
    assert ask(tools=[TOOL], tool_choice="none").usage.prompt_tokens == plain
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *chat("weather in oslo and rome"),
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "warm"}]},
    ]
    answer = client.chat.completions.create(model="base", messages=messages, tools=[TOOL], max_tokens=4)
    assert answer.usage.completion_tokens >= 1


def test_the_server_reads_messages_like_training_data(client, tmp_path, model_folder):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    parts = [{"type": "text", "text": "-3"}]
    system = {"role": "system", "content": "Be brief."}
    asked = [{"role": "assistant", "content": "hello"}, *chat("weather in oslo")[1:]]  # it begins with a greeting
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1"}
    tokenizer = mlx_afm.load(model_folder)[1]
    for contents, one in [
        ([parts], "-3"),
        ([parts, "warm"], "-3\nwarm"),
        ([[{"city": "Oslo"}]], '[{"city": "Oslo"}]'),
        ([{"a": 1}, parts], '{"a": 1}\n-3'),
    ]:
        messages = [system, *asked, calls, *({**result, "content": content} for content in contents)]
        answer = client.chat.completions.create(model="base", messages=messages, max_tokens=1)
        expected = to_prompt_ids(tokenizer, [system, *asked, calls, {**result, "content": one}])
        assert answer.usage.prompt_tokens == len(expected) == len(to_prompt_ids(tokenizer, messages))


@pytest.mark.parametrize("key", ["weight", "train", "label"])
def test_weights_are_for_training_alone(key, client):
    messages = [*chat("a"), {"role": "assistant", "content": "b", key: 0}, *chat("c")[1:]]
    with pytest.raises(openai.BadRequestError, match=rf"messages\[2\].{key}: not a field of this request"):
        client.chat.completions.create(model="base", messages=messages)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_tool_that_must_be_called_is(choice, ask):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    clock = {"type": "function", "function": {"name": "clock"}}
    settings = {"tools": [clock, SMALL_TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 80}
    answer = ask("copy vome.go to zasu.txt", **settings).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert (call.function.name, json.loads(call.function.arguments)) in [("clock", {}), *CITIES][choice != "required" :]
    streamed = [delta for c in ask(**settings, stream=True) for delta in c.choices[0].delta.tool_calls or ()]
    assert [(part.function.name, part.function.arguments) for part in streamed] == [
        (call.function.name, call.function.arguments)
    ]


def test_a_conversation_in_parts_with_a_developer_message(client, ask):
    parts = [{"type": "text", "text": "copy vome.go "}, {"type": "text", "text": "to zasu.txt"}]
    messages = [{"role": "developer", "content": SYSTEM}, {"role": "user", "content": parts, "name": "me"}]
    answer = client.chat.completions.create(model="base", messages=messages)
    assert answer.choices[0].message.content == ask().choices[0].message.content


def test_completions_continue_text(client, model_folder):
    model, tokenizer = mlx_afm.load(model_folder)
    ids = [tokenizer.eos_id, *tokenizer.encode("cp vome")]
    expected = mlx_afm.generate(model, tokenizer, ids, max_tokens=6)
    create = client.completions.create
    answer = create(model="base", prompt="cp vome", max_tokens=6, logprobs=2)
    assert answer.choices[0].text == expected
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == expected
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    assert all(len(top) == 2 and token in top for token, top in zip(told.tokens, told.top_logprobs))
    both = create(model="base", prompt=["cp vome", "sort"], max_tokens=6, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == expected != both.choices[2].text
    assert create(model="base", prompt=ids, max_tokens=6).choices[0].text == expected
    streamed = "".join(c.choices[0].text for c in create(model="base", prompt="cp vome", max_tokens=6, stream=True))
    assert streamed == expected


def test_what_prompts_share_is_computed_once(model_folder, served_adapters, client):
    """A conversation that comes back, and another user's with the same system message: same answers, less computed."""
    first = chat("show the first 3 lines of kano.md and then count the words in pelo.txt " * 3)
    second = [*first, {"role": "assistant", "content": "head -n 3 kano.md"}, {"role": "user", "content": "now sort it"}]
    third = [*second, {"role": "assistant", "content": "sort kano.md"}, {"role": "user", "content": "remove it"}]
    prompts = [first, second, third, chat("list the files"), third, second]

    def ask(url, messages):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as own:
            answer = own.chat.completions.create(
                model="some", messages=messages, max_tokens=12, logprobs=True, stream=False
            )
        told = [token.logprob for token in answer.choices[0].logprobs.content]
        return (answer.choices[0].message.content, told), answer.usage.prompt_tokens_details.cached_tokens

    adapters, answers, cached = {"some": served_adapters["some"]}, {}, {}
    for limit in (0, 10**8):
        with running(model_folder, adapters, ServeConfig(port=0, prefix_bytes=limit)) as own:
            answers[limit], cached[limit] = zip(*[ask(own.url, messages) for messages in prompts])
    assert answers[0] == answers[10**8]  # to the last bit
    assert cached[0] == (0,) * 6
    system, conversation = cached[10**8][1], cached[10**8][2]
    assert cached[10**8] == (0, system, conversation, system, conversation, conversation)
    assert conversation > system + 64


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 4096}, r"at most 4096 tokens, found \d+ of the prompt and 4096 of the answer"),
        ({"temperature": 3}, "temperature: expected less than or equal to 2, found 3"),
        ({"n": 99}, "n: expected at most 8, found 99"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: list should have at most 4 items"),
        ({"top_logprobs": 3}, "top_logprobs: expected logprobs to be true"),
        ({"logit_bias": {"9999": 1}}, "logit_bias: keys, token 0: token id outside the vocabulary"),
        ({"tool_choice": "required"}, "tool_choice: expected tools with it"),
        (
            {"tool_choice": "always", "tools": [TOOL]},
            'tool_choice: expected "auto", "none" or "required", found "always"',
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "wind"}}, "tools": [TOOL]},
            "no tool is named 'wind'",
        ),
        (
            {"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format: an",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: this field is required"),
        ({"extra_body": {"temprature": 1}}, r"temprature: not a field .*did you mean temperature"),
        ({"extra_body": {"temprature": 1}, "seed": 0.5}, "2 fields cannot be used"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(settings, says, ask):
    with pytest.raises(openai.BadRequestError, match=says) as error:
        ask(**settings)
    assert error.value.type == "invalid_request_error"


def test_an_unknown_model_is_told_which_there_are(ask):
    with pytest.raises(openai.NotFoundError, match="one of base, whole, small, some, dora") as error:
        ask(model="poet")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_messages_that_cannot_be_answered(client):
    def refused(messages, says):
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(model="base", messages=messages)

    refused([], "messages: list should have at least 1 item")
    refused([{"role": "poet", "content": "hi"}], r"messages\[0\].role: expected \"system\"")
    refused([{"role": "user", "content": "a<turn_end>b"}], "special token")
    refused([*chat("hi"), {"role": "assistant", "content": "ho"}], "a user message or a tool's result last")
    refused([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "not text")
    refused(chat("word " * 5000), "do not fit in the context")


def test_numbers_are_finite(ask):
    answer = ask(logprobs=True, top_logprobs=20, temperature=0.0).choices[0]
    assert all(math.isfinite(t.logprob) for token in answer.logprobs.content for t in token.top_logprobs)
