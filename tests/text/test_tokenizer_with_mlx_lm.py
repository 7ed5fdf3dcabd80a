"""mlx-lm's own loop and detokenizer drive the tokenizer as it is, and the written folder too."""

import random
import warnings
from importlib.metadata import version

import pytest

from mlx_afm.text.hf_tokenizer import write_hf_tokenizer
from mlx_afm.text.tokenizer import AFMTokenizer

mx = pytest.importorskip("mlx.core", reason="needs mlx")
nn = pytest.importorskip("mlx.nn", reason="needs mlx")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    from mlx_lm.models.cache import KVCache
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
    from mlx_lm.tokenizer_utils import load as load_tokenizer

# Up to 0.31, the last for Python 3.10, mlx-lm streams characters of several byte pieces wrongly.
OLD_MLX_LM = tuple(map(int, version("mlx-lm").split(".")[:2])) < (0, 32)
EMOJI = pytest.param("Größe 東京 🎉🎉", marks=pytest.mark.skipif(OLD_MLX_LM, reason="mlx-lm below 0.32"))
TEXTS = ["hello", "a\n b\n    c\n\n", " lead", "tab\there  two ", "\n\n x", "a ,b . c"]
ANSWERS = [*TEXTS, EMOJI]


class Script(nn.Module):
    """A stand-in model that says given ids one after the other."""

    def __init__(self, ids, vocab_size, prompt_length):
        super().__init__()
        self.layers = [None]
        self.script, self.vocab_size, self.prompt_length = ids, vocab_size, prompt_length

    def make_cache(self):
        return [KVCache()]

    def __call__(self, tokens, cache=None):
        length = tokens.shape[1]
        cache[0].update_and_fetch(mx.zeros((1, 1, length, 1)), mx.zeros((1, 1, length, 1)))
        said = min(max(cache[0].offset - self.prompt_length, 0), len(self.script) - 1)
        logits = mx.where(mx.arange(self.vocab_size) == self.script[said], 10.0, 0.0)
        return mx.broadcast_to(logits, (1, length, self.vocab_size))


def answer_ids(tokenizer, text):
    """Ids of an answer as they follow the head of its turn."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], add_generation_prompt=False
    )
    assert ids[: len(prompt)] == prompt
    return prompt, ids[len(prompt) :]


@pytest.mark.parametrize("name", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ANSWERS)
def test_stream_generate_gives_the_answer_and_stops_at_the_end_of_the_turn(model_files, name, text):
    tokenizer = AFMTokenizer.from_file(model_files[name])
    prompt, answer = answer_ids(tokenizer, text)
    model = Script([*answer, tokenizer.newline_id], tokenizer.vocab_size, len(prompt))
    responses = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=200))
    assert "".join(response.text for response in responses) == text
    assert [response.token for response in responses][-1] == tokenizer.turn_end_id
    assert responses[-1].finish_reason == "stop"


def stream(tokenizer, ids):
    detokenizer = TokenizerWrapper(tokenizer).detokenizer
    assert isinstance(detokenizer, NaiveStreamingDetokenizer)
    text = ""
    for token in ids:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
    detokenizer.finalize()
    return text + detokenizer.last_segment


def test_streamed_text_is_the_decoded_text(tokenizer):
    rng = random.Random(3)
    frequent = [tokenizer.newline_id, tokenizer.prefix_id, tokenizer.unk_id]
    for _ in range(150):
        ids = [rng.choice([rng.randrange(tokenizer.vocab_size), *frequent]) for _ in range(rng.randint(1, 30))]
        assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ANSWERS)
def test_streamed_answers(tokenizer, text):
    _, ids = answer_ids(tokenizer, text)
    assert stream(tokenizer, ids[:-1]) == tokenizer.decode(ids[:-1])


def test_wrapper_passes_the_rest_through(toy):
    wrapper = TokenizerWrapper(toy, eos_token_ids=toy.eos_token_ids)
    messages = [{"role": "user", "content": "hello"}]
    assert wrapper.has_chat_template
    assert not wrapper.has_thinking
    assert wrapper.eos_token_ids == {toy.turn_end_id, toy.eos_id}
    assert wrapper.apply_chat_template(messages, add_generation_prompt=True) == toy.apply_chat_template(messages)
    assert isinstance(wrapper.apply_chat_template(messages, tokenize=False), str)
    assert (wrapper.vocab_size, wrapper.bos_token) == (toy.vocab_size, None)
    wrapper.add_eos_token("<executable_end>")
    assert toy.executable_end_id in wrapper.eos_token_ids


@pytest.mark.parametrize("name", ["unigram", "bpe"])
def test_stock_mlx_lm_reads_the_written_folder(model_files, name, tmp_path):
    write_hf_tokenizer(model_files[name], tmp_path)
    ours, stock = AFMTokenizer.from_file(model_files[name]), load_tokenizer(tmp_path)
    assert isinstance(stock.detokenizer, SPMStreamingDetokenizer)
    assert not stock.detokenizer.trim_space
    assert stock.eos_token_ids == {ours.turn_end_id}
    for text in TEXTS:
        prompt, answer = answer_ids(ours, text)
        messages = [{"role": "user", "content": "hi"}]
        assert stock.apply_chat_template(messages, add_generation_prompt=True) == prompt
        model = Script([*answer, ours.newline_id], ours.vocab_size, len(prompt))
        assert mlx_lm.generate(model, stock, prompt, max_tokens=200) == text
