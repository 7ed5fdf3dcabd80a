"""Tokens to text and answers, where the bundled model says too little by itself."""

import json

import mlx.core as mx
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_afm
from mlx_afm.generation.sampling import TokenLogprob
from mlx_afm.generation.text_stream import TextStream
from mlx_afm.serving import ServeConfig, plan, running
from mlx_afm.serving.answers import TokenNames
from mlx_afm.text.tokenizer import AFMTokenizer
from serving_client import REQUESTS, chat

openai = pytest.importorskip("openai", reason="needs the openai library (dev extra)")
CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": {"city": "Rome"}}]
SAYS = f"Let me see. <executable_start> ```function\n{json.dumps(CALLS)}```<executable_end>"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return mlx_afm.load(model_folder)[1]


def pieces(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops, keeps_tokens=True)
    made = []
    for number, token in enumerate(ids):
        made.append(stream.add(TokenLogprob(token, float(number))))
        if stream.stopped:
            break
    return [*made, stream.finish()], stream.stopped


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_that_decoding_gives(data, tokenizer):
    tokens = st.integers(0, tokenizer.vocab_size - 1).filter(lambda token: token not in tokenizer.eos_token_ids)
    ids = data.draw(st.lists(tokens, max_size=30))
    made, stopped = pieces(tokenizer, ids)
    assert "".join(piece.text for piece in made) == tokenizer.decode(ids)
    assert [token.token for piece in made for token in piece.tokens] == ids
    assert not stopped


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_stop_string_cuts_wherever_tokens_do(data, tokenizer):
    ids = data.draw(st.lists(st.integers(5, tokenizer.vocab_size - 1), min_size=1, max_size=20))
    text = tokenizer.decode(ids)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stops = [stop for stop in (text[start : start + data.draw(st.integers(1, 6))], "never there") if stop]
    made, stopped = pieces(tokenizer, ids, stops)
    said = "".join(piece.text for piece in made)
    if "\ufffd" in text:  # what a cut character looks like depends on what came before
        return
    place = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert (said, stopped) == (text[:place], place < len(text))
    names = TokenNames(tokenizer)
    told = [names.describe(item.token)[0] for piece in made for item in piece.tokens]
    assert len("".join(told)) >= len(said)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A tokenizer with a piece for every byte and none for é and €."""
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    marks = ["<turn_start>", "<turn_end>", "<n>", "<executable_start>", "<executable_end>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab bc abc"] * 20),
        model_prefix=str(file.with_suffix("")),
        model_type="bpe",
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=marks,
        minloglevel=9,
    )
    return AFMTokenizer.from_file(file)


def test_a_character_in_bytes_is_told_whole(bytewise):
    ids = bytewise.encode("\na é € b")[2:]
    made, _ = pieces(bytewise, ids)
    assert "".join(piece.text for piece in made) == "a é € b"
    assert all("\ufffd" not in piece.text for piece in made)
    assert [token.token for piece in made for token in piece.tokens] == ids
    names = TokenNames(bytewise)
    assert bytes(b for token in ids for b in names.describe(token)[1]).decode() == "a é € b"
    assert sum(names.describe(token)[0].startswith("bytes:\\x") for token in ids) == 5
    assert names.describe(bytewise.newline_id) == ("\n", [10])
    assert names.describe(10**6)[0] == "<1000000>"
    cut, _ = pieces(bytewise, ids[: next(i for i, t in enumerate(ids) if names.describe(t)[0].startswith("bytes")) + 1])
    assert "".join(piece.text for piece in cut) == "a \ufffd"  # half of a character at the end


@pytest.fixture(scope="module")
def scripted(model_folder):
    """A client of a server whose answers with a response format are the tokens that a test sets."""
    script = []

    def constraint_of(asked, _):
        start = len(asked.prompts[0].ids)

        def process(history, logits):
            return mx.where(mx.arange(logits.shape[-1]) == script[len(history) - start], 0.0, -mx.inf)[None]

        return lambda: process

    with (
        pytest.MonkeyPatch.context() as patch,
        running(model_folder, {}, ServeConfig(port=0, model_id="base")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        patch.setattr(plan, "constraint_of", constraint_of)

        def ask(ids, **extra):
            script[:] = ids
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
            return client.chat.completions.create(
                model="base", messages=chat(REQUESTS[0]), response_format=form, max_tokens=300, **extra
            )

        yield ask


@pytest.mark.parametrize(
    ("stop", "cuts"),
    [
        (["bade", "ad"], ["x|ba|de", "x|b|a|d|e", "x|ba|d|e", "x|b|a|de"]),  # "ad" is whole before "bade" is
        (["box", "o"], ["x|box", "x|b|o|x", "x|bo|x"]),  # "o" is whole before "box" is
        (["d", "ad"], ["x|b|add", "x|ba|d|d", "x|b|a|d|d"]),  # of both, which "d" completes, the longer counts
    ],
    ids=str,
)
def test_an_answer_ends_at_the_first_character_that_completes_a_stop_string(scripted, tokenizer, stop, cuts):
    """However the text is cut into tokens, in a stream and without one."""
    for cut in cuts:
        ids = [*map(tokenizer.convert_tokens_to_ids, cut.split("|")), tokenizer.turn_end_id]
        choice = scripted(ids, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("xb", "stop"), cut
        streamed = list(scripted(ids, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "xb"
        assert streamed[-1].choices[0].finish_reason == "stop"
        told = scripted(ids, stop=stop, logprobs=True).choices[0].logprobs.content
        assert "".join(token.token for token in told).startswith("xb")
        free = scripted(ids).choices[0]
        assert free.message.content == cut.replace("|", "")


def cut_at_stops(text, stops):
    """The rule of stop strings, character by character: the first that completes one; of several the longest."""
    for end in range(1, len(text) + 1):
        whole = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(whole)]
    return text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stop_strings_hold_for_any_text_cut_and_stops(data, scripted, tokenizer):
    pieces = ["a", "b", "d", "e", "ba", "be", "da", "de", "add", "A"]
    cut = data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=12))
    stops = data.draw(st.lists(st.text("abdeA", min_size=1, max_size=4), min_size=1, max_size=4))
    ids = [*map(tokenizer.convert_tokens_to_ids, cut), tokenizer.turn_end_id]
    wanted = cut_at_stops("".join(cut), stops)
    whole = scripted(ids, stop=stops).choices[0].message.content
    streamed = scripted(ids, stop=stops, stream=True)
    assert whole == wanted == "".join(chunk.choices[0].delta.content or "" for chunk in streamed)


@pytest.fixture
def parrot(scripted, tokenizer):
    """A client whose answers with a response format say `SAYS`."""
    ids = [*tokenizer.encode("\n" + SAYS)[2:], tokenizer.turn_end_id]
    return lambda **extra: scripted(ids, **extra)


def unmarked(text):
    return text.replace("<executable_start>", "").replace("<executable_end>", "")


def test_tool_calls_come_as_such(parrot):
    plain = parrot().choices[0]
    assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == (unmarked(SAYS), None, "stop")
    answer = parrot(tools=[TOOL]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Let me see. ", "tool_calls")
    called = [(c.type, c.function.name, json.loads(c.function.arguments)) for c in answer.message.tool_calls]
    assert called == [("function", call["name"], call["arguments"]) for call in CALLS]
    assert len({c.id for c in answer.message.tool_calls}) == 2
    one = parrot(tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert [json.loads(c.function.arguments)["city"] for c in one.message.tool_calls] == ["Oslo"]


def test_tool_calls_come_in_a_stream(parrot):
    text, calls, reasons = "", {}, []
    for chunk in parrot(tools=[TOOL], stream=True, n=2):
        (choice,) = chunk.choices
        if choice.index == 0:
            text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            calls.setdefault((choice.index, call.index), (call.function.name, call.function.arguments))
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == "Let me see. "
    assert sorted(calls) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert json.loads(calls[1, 1][1]) == {"city": "Rome"}
    assert reasons == ["tool_calls", "tool_calls"]
