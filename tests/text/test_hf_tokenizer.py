import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece_models import TEXT, model_bytes, toy_pieces

from mlx_afm.errors import FormatError
from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
from mlx_afm.text.tokenizer import AFMTokenizer

TEXTS = [
    "",
    "a",
    "\n",
    " \n",
    "\n ",
    "\n\na",
    "  a   b  ",
    "a\n b\n    c\n\td",
    " x",
    "a\rb",
    "▁x",
    "Größe 東京 🎉 ﬁ １２",
]
TEXTS += ["aaaa    bbb\t\t\n\n\n  ", "é e\u0301", "a<b>n</b>", "< n >", "\n\n", "\x00\x7f", TEXT, *TEXT.splitlines()]
USER = {"role": "user", "content": " hello\n\nworld "}
ANSWER = {"role": "assistant", "content": "\n ok  ok\n"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln"}}}]}
TWO_CALLS = {
    **CALL,
    "content": "Wait. ",
    "tool_calls": [*CALL["tool_calls"], {"function": {"name": "ü", "arguments": "{}"}}],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "City", "schema": {"type": "object", "x": [1, 2.5, None]}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "é"}}]
CONVERSATIONS = [
    [USER],
    [USER, ANSWER],
    [{"role": "system", "content": "Be\nbrief."}, USER, ANSWER, USER],
    [USER, CALL, {"role": "tool", "content": {"a": "ä"}}],
    [USER, TWO_CALLS, {"role": "function", "content": "text\n"}, ANSWER],
    [USER, CALL, {"role": "tool", "content": [{"name": "f"}, {"name": "ü"}]}, ANSWER],
    [USER, CALL, {"role": "tool", "content": TOOLS}, ANSWER],
    [USER, CALL, {"role": "tool", "content": [{"name": "f", "parameters": {}}]}, ANSWER],
    [USER, CALL, {"role": "tool", "content": []}, ANSWER],
    [USER, CALL, {"role": "tool", "content": [{"type": "text", "text": "-3"}, {"type": "text", "text": " °"}]}, ANSWER],
    [{"role": "developer", "content": "Be brief."}, ANSWER, USER],
    [{**USER, "response_format": FORMAT}],
    [{"role": "system", "content": "Be brief.", "tools": TOOLS}, USER],
]


@pytest.fixture(scope="session")
def folders(model_files, tmp_path_factory):
    """Name to written folder."""
    out = {name: tmp_path_factory.mktemp(f"hf-{name}") for name in model_files}
    for name, folder in out.items():
        write_hf_tokenizer(model_files[name], folder)
    return out


def load(folder):
    transformers = pytest.importorskip("transformers", reason="needs transformers, which mlx-lm brings")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"transformers|torch|google")
        return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session", params=["toy", "unigram", "bpe", "unigram-unk", "bpe-unk", "unigram-nfkc"])
def pair(request, folders):
    """Our tokenizer and the stock one of the same folder."""
    folder = folders[request.param]
    return AFMTokenizer.from_file(folder / "tokenizer.model"), load(folder)


def test_a_model_without_a_pad_piece_has_no_pad_token(tmp_path):
    pieces = [("<none>" if text == "<pad>" else text, score, kind) for text, score, kind in toy_pieces()]
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(pieces))
    write_hf_tokenizer(tmp_path / "tokenizer.model", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["pad_token"] is None
    assert load(tmp_path / "hf").pad_token is None


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_the_same_ids(pair, text):
    ours, stock = pair
    assert stock.encode(text) == stock.encode(text, add_special_tokens=False) == ours.encode(text)
    if ours.unk_id not in ours.encode(text):
        assert stock.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_real_texts_have_the_same_ids(pair, tldr_file):
    ours, stock = pair
    with tldr_file.open(encoding="utf-8") as lines:
        texts = [message["content"] for line, _ in zip(lines, range(250), strict=False) for message in json.loads(line)]
    texts.append("\n".join(texts))
    assert len(texts) == 751
    for text in texts:
        assert stock.encode(text) == ours.encode(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.one_of(st.sampled_from("aeinorst .,\n<>_/"), st.characters(codec="utf-8", exclude_characters="\ue000")))
)
def test_any_text_has_the_same_ids(pair, text):
    ours, stock = pair
    if not any(piece in text for piece in [*ours.special_pieces, "<0x"]):
        assert stock.encode(text) == ours.encode(text)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_conversations_have_the_same_ids(pair, messages, prompt):
    ours, stock = pair
    expected = ours.apply_chat_template(messages, add_generation_prompt=prompt)
    ids = stock.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert ids == expected
    text = stock.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert stock.encode(text, add_special_tokens=False) == expected


def test_tools_and_open_answers(pair):
    ours, stock = pair
    ids = stock.apply_chat_template([USER], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert ids == ours.apply_chat_template([USER], tools=TOOLS)
    messages = [USER, {"role": "assistant", "content": "It is"}]
    ids = stock.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert ids == ours.apply_chat_template(messages, continue_final_message=True)


def test_properties_that_programs_read(pair):
    ours, stock = pair
    assert stock.eos_token_id == ours.turn_end_id
    assert (stock.pad_token_id, stock.unk_token_id, stock.bos_token_id) == (ours.pad_id, ours.unk_id, None)
    renamed = {"\n" if piece == "<n>" else piece: index for piece, index in ours.get_vocab().items()}
    assert stock.get_vocab() == renamed
    assert len(stock) == stock.vocab_size == ours.vocab_size
    assert stock.chat_template == ours.chat_template


def test_files(folders, model_files):
    folder = folders["bpe"]
    assert (folder / "tokenizer.model").read_bytes() == model_files["bpe"].read_bytes()
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_writing_again_changes_nothing_else(folders, model_files, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_hf_tokenizer(model_files["unigram"], tmp_path)
    for path in folders["unigram"].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "config.json").read_text() == "{}"


def test_models_without_an_equal_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes([*toy_pieces(), ("gone", 0, 5)], model_type=4))
    with pytest.raises(FormatError) as error:
        write_hf_tokenizer(path, tmp_path / "out")
    assert "model type 4" in str(error.value)
    assert "1 unused pieces, such as 'gone'" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_folders_config_does_not_disturb(folders, tmp_path):
    ours = AFMTokenizer.from_file(folders["unigram"] / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "afm7", "vocab_size": 480}')
    write_hf_tokenizer(folders["unigram"] / "tokenizer.model", tmp_path)
    assert load(tmp_path).encode("hello\n world") == ours.encode("hello\n world")
