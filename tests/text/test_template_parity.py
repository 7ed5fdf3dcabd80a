"""The template against tamm's: same ids, and our targets shifted by one are its labels."""

import copy
import json
import random
import warnings

import pytest

from mlx_afm.text.messages import parse_messages
from mlx_afm.text.template import encode, render

pytestmark = pytest.mark.parity

WORDS = ["a", "bc", "hello", "World", "12.5", "{json}", "[x]", "naïve", "東京", "🎉", "`code`", "<b>", "n>"]
WORDS += ["tab\there", "user", "assistant", "system", "", "two"]


@pytest.fixture(scope="module")
def tamm_modules():
    pytest.importorskip("torch", reason="needs the parity extra (torch)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"tamm|torch")
        pytest.importorskip("tamm", reason="needs the parity extra (tamm)")
        from tamm.preprocessors.instruct_lm.afm import AFMChatTemplateV6Preprocessor
        from tamm.tokenizers.afm import AFMTokenizer as TammTokenizer
    return AFMChatTemplateV6Preprocessor, TammTokenizer


@pytest.fixture(scope="module")
def reference(tamm_modules, tokenizer, model_file):
    """(messages, tools, generate) -> (ids, labels) of tamm, with its own choice of system message."""
    preprocessor, tamm_tokenizer = tamm_modules
    spec = tamm_tokenizer(str(model_file), extra_properties={"eot_id": tokenizer.turn_end_id})
    makers = {flag: preprocessor(spec, prepend_system_message=flag) for flag in (True, False)}

    def run(messages, tools=None, generate=False, prepend=None):
        if prepend is None:
            prepend = messages[0]["role"] != "system"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No system message found")
            out = makers[prepend](copy.deepcopy(messages), tools=tools, generate_prefix=generate)
        return out.input_ids, out.label_ids

    return run


def words(rng, low=0):
    separators = [" ", " ", " ", "\n", "\n\n", "  "]
    return "".join(rng.choice(WORDS) + rng.choice(separators) for _ in range(rng.randint(low, 8)))


def value(rng, depth=2):
    kinds = ["text", "number", "none"] + (["dict", "list"] if depth else [])
    kind = rng.choice(kinds)
    if kind == "dict":
        return {rng.choice("abcü"): value(rng, depth - 1) for _ in range(3)}
    if kind == "list":
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {"text": words(rng), "number": rng.choice([1, -2.5, 1e30, True]), "none": None}[kind]


def definition(rng):
    return {"type": "function", "function": {"name": rng.choice("fgh"), "description": words(rng), "parameters": {}}}


def conversation(rng):
    messages = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        user = {"role": "user", "content": words(rng)}
        if rng.random() < 0.3:
            schema = {"schema": {"type": "object", "x": value(rng)}}
            schema |= {key: words(rng) for key in ("name", "description") if rng.random() < 0.5}
            user["response_format"] = {"type": "json_schema", "json_schema": schema}
        messages.append(user)
        for _ in range(rng.choice([0, 0, 1, 2])):
            messages += tool_use(rng)
        messages.append({"role": "assistant", "content": words(rng)})
    return messages


def tool_use(rng):
    arguments = rng.choice([json.dumps(value(rng)), json.dumps(value(rng), separators=(",", ":")), "no json", ""])
    calls = [{"function": {"name": words(rng, 1), "arguments": arguments}} for _ in range(rng.randint(1, 2))]
    result = rng.choice([words(rng), {"r": value(rng)}, [definition(rng) for _ in range(rng.randint(0, 2))]])
    yield {"role": "assistant", "content": words(rng), "tool_calls": calls}
    yield {"role": rng.choice(["tool", "function"]), "content": result}


def ours(messages, tokenizer, **settings):
    checked = parse_messages(messages, where="x", special_pieces=tokenizer.special_pieces)
    return encode(render(checked, **settings), tokenizer)


def shifted(encoded):
    """Labels as tamm gives them: the target of each position is the token after it."""
    targets = [token if trained else -100 for token, trained in zip(encoded.ids, encoded.trained, strict=True)]
    return [*targets[1:], -100]


def test_generated_conversations(reference, tokenizer):
    rng = random.Random(20)
    for _ in range(400):
        messages = conversation(rng)
        tools = [definition(rng) for _ in range(rng.randint(1, 3))] if rng.random() < 0.4 else None
        encoded = ours(messages, tokenizer, tools=tools)
        assert (encoded.ids, shifted(encoded)) == reference(messages, tools)


def test_tools_on_the_system_message(reference, tokenizer):
    rng = random.Random(21)
    for _ in range(20):
        messages = conversation(rng)
        if messages[0]["role"] == "system":
            tools = [definition(rng)]
            carried = [{**messages[0], "tools": tools}, *messages[1:]]
            assert ours(carried, tokenizer).ids == reference(messages, tools)[0]


def test_generation_prompts(reference, tokenizer):
    rng = random.Random(22)
    for _ in range(100):
        messages = conversation(rng)[:-1]
        assert (ours(messages, tokenizer, add_generation_prompt=True).ids, None) == reference(messages, generate=True)


def test_without_system_message(reference, tokenizer):
    rng = random.Random(23)
    for _ in range(100):
        messages = [message for message in conversation(rng) if message["role"] != "system"]
        encoded = ours(messages, tokenizer, system=None)
        assert (encoded.ids, shifted(encoded)) == reference(messages, prepend=False)


def test_real_records(reference, tokenizer, tldr_file):
    with tldr_file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(600), strict=False)]
    assert len(records) == 600
    for messages in records:  # two of them spell `<n>`, a newline with tamm and with us
        checked = parse_messages(messages, where="x", special_pieces=tokenizer.special_pieces)
        encoded = encode(render(checked), tokenizer)
        assert (encoded.ids, shifted(encoded)) == reference(messages)
