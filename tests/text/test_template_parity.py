"""The template against tamm's: same ids, and our targets shifted by one are its labels."""

import copy
import functools
import json
import random
import warnings
from collections import Counter

import numpy as np
import pytest

from mlx_afm.data import read_tokens
from mlx_afm.errors import ConfigError
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

    @functools.lru_cache
    def maker(prepend, system):
        settings = {} if system is None else {"system_message": system}
        return preprocessor(spec, prepend_system_message=prepend, **settings)

    def run(messages, tools=None, generate=False, prepend=None, system=None):
        if prepend is None:
            prepend = messages[0]["role"] != "system"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No system message found")
            out = maker(prepend, system)(copy.deepcopy(messages), tools=tools, generate_prefix=generate)
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
    result = rng.choice([words(rng), {"r": value(rng)}, [definition(rng) for _ in range(rng.randint(1, 2))]])
    yield {"role": "assistant", "content": words(rng), "tool_calls": calls}
    yield {"role": rng.choice(["tool", "function"]), "content": result}


def ours(messages, tokenizer, **settings):
    checked = parse_messages(messages, where="x", special_pieces=tokenizer.special_pieces)
    return encode(render(checked, **settings), tokenizer)


def shifted(encoded):
    """Labels as tamm gives them: the target of each position is the token after it."""
    targets = [token if trained else -100 for token, trained in zip(encoded.ids, encoded.trained, strict=True)]
    return [*targets[1:], -100]


def kinds(messages, tools):
    """What a conversation has, each to be counted once."""
    found = {"own system message" if messages[0]["role"] == "system" else "default system message"}
    found |= {"tool definitions"} if tools else set()
    found |= {"several answers"} if sum(message["role"] == "assistant" for message in messages) > 1 else set()
    for message in messages:
        if message.get("tool_calls"):
            found |= {"tool call", "several tool calls"} if len(message["tool_calls"]) > 1 else {"tool call"}
            found |= {"words beside a tool call"} if message["content"].strip() else set()
        if message["role"] in ("tool", "function"):
            names = {str: "result as text", dict: "result as an object", list: "new tools"}
            found |= {names[type(message["content"])], f"role {message['role']}"}
        if "response_format" in message:
            schema = message["response_format"]["json_schema"]
            found |= {"response format"} | {
                f"response format without {key}" for key in {"name", "description"} - {*schema}
            }
    return found


def test_generated_conversations(reference, tokenizer):
    rng, equal, counts = random.Random(20), 0, Counter()
    for _ in range(400):
        messages = conversation(rng)
        tools = [definition(rng) for _ in range(rng.randint(1, 3))] if rng.random() < 0.4 else None
        encoded = ours(messages, tokenizer, tools=tools)
        equal += (encoded.ids, shifted(encoded)) == reference(messages, tools)
        counts.update(kinds(messages, tools))
    assert equal == 400
    assert len(counts) == 15
    assert min(counts.values()) >= 50, counts


def test_tools_on_the_system_message(reference, tokenizer):
    """tamm takes definitions as an argument only; on the message, as the toolkit's data has them, they count too."""
    rng, equal = random.Random(21), 0
    while equal < 100:
        messages = conversation(rng)
        if messages[0]["role"] == "system":
            tools = [definition(rng) for _ in range(rng.randint(1, 3))]
            encoded = ours([{**messages[0], "tools": tools}, *messages[1:]], tokenizer)
            assert (encoded.ids, shifted(encoded)) == reference(messages, tools)
            assert encoded.ids != ours(messages, tokenizer).ids
            equal += 1


def test_a_custom_system_message(reference, tokenizer):
    rng = random.Random(24)
    for number in range(100):
        messages = [message for message in conversation(rng) if message["role"] != "system"]
        system = f"{number}: {words(rng)}".strip(" ")
        tools = [definition(rng)] if number % 2 else None
        encoded = ours(messages, tokenizer, system=system, tools=tools)
        assert (encoded.ids, shifted(encoded)) == reference(messages, tools, prepend=True, system=system)


def test_rules_of_the_system_message(reference, tokenizer):
    messages = [{"role": "system", "content": "own"}, *conversation(random.Random(25))[-2:]]
    with pytest.raises(Exception, match=r"(?i)system"):  # tamm refuses a second one; ours never writes one
        reference(messages, prepend=True)
    assert ours(messages, tokenizer).ids == ours(messages, tokenizer, system="other").ids == reference(messages)[0]
    for wrong in (" own", "own "):
        with pytest.raises(ValueError, match=r"(?i)space|whitespace|strip"):
            reference(messages[1:], prepend=True, system=wrong)
        with pytest.raises(ConfigError, match="spaces around it"):
            ours(messages[1:], tokenizer, system=wrong)


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


def test_real_records(reference, tokenizer, tldr_files):
    with tldr_files["valid"].open(encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(600), strict=False)]
    assert len(records) == 600
    for messages in records:  # two of them spell `<n>`, a newline with tamm and with us
        checked = parse_messages(messages, where="x", special_pieces=tokenizer.special_pieces)
        encoded = encode(render(checked), tokenizer)
        assert (encoded.ids, shifted(encoded)) == reference(messages)


@pytest.mark.slow
@pytest.mark.parametrize("model_file", ["unigram", "bpe"], indirect=True)
def test_all_real_records_through_the_data_line(reference, model_file, tldr_files):
    equal = 0
    for path in tldr_files.values():
        table = read_tokens((path,), model_file)
        with path.open(encoding="utf-8") as lines:
            for line, tokens in zip(lines, table, strict=True):
                ids, labels = reference(json.loads(line))
                targets = np.where(tokens.weights > 0, tokens.ids, -100)
                equal += tokens.ids.tolist() == ids and [*targets[1:].tolist(), -100] == labels
    assert equal == 29_946
