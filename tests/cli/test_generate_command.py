import re

import pytest

import mlx_afm

PROMPT = "sort vido.conf in reverse"


def test_the_three_forms_of_an_adapter_say_the_same_and_not_what_the_base_says(adapter_forms, say):
    answers = [say("--adapter-path", path) for path in adapter_forms.values()]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["text"] != say()["text"]


def test_json_tells_text_and_counts(model_folder, say):
    model, tokenizer = mlx_afm.load(model_folder)
    told = say(tokens=40)
    assert told["text"] == mlx_afm.generate(model, tokenizer, PROMPT, max_tokens=40)
    ids = mlx_afm.generation.to_prompt_ids(tokenizer, PROMPT)
    assert told["prompt_tokens"] == len(ids)
    assert told["finish_reason"] == "stop"
    assert 1 < told["generation_tokens"] < 40
    assert set(told) == {"text", "prompt_tokens", "generation_tokens", "finish_reason"}


def test_max_tokens_cuts(say):
    whole, cut = say(tokens=40), say(tokens=2)
    assert (cut["generation_tokens"], cut["finish_reason"]) == (2, "length")
    assert whole["text"].startswith(cut["text"])


def test_plain_output_is_the_text_alone(model_folder, cli, say):
    ran = cli("generate", "--model", model_folder, "--prompt", PROMPT, "-m", 8)
    assert (ran.code, ran.out, ran.err) == (0, say()["text"] + "\n", "")


def test_verbose_counts_on_stderr(model_folder, cli, say):
    ran = cli("generate", "--model", model_folder, "--prompt", PROMPT, "-m", 8, "--verbose", "true")
    assert ran.out == say()["text"] + "\n"
    told = say()
    assert re.fullmatch(
        rf"prompt {told['prompt_tokens']} tokens, [\d.]+ per second; "
        rf"answer {told['generation_tokens']} tokens, [\d.]+ per second\n",
        ran.err,
    )


def test_a_dash_reads_the_prompt_from_stdin(model_folder, cli, say):
    ran = cli("generate", "--model", model_folder, "--prompt", "-", "-m", 8, "--json", stdin=PROMPT.encode())
    assert ran.json == say()


def test_the_system_prompt_takes_the_place_of_the_models_own(say):
    long, short = say("--system-prompt", "Answer with one shell command. " * 9), say("--system-prompt", "Go.")
    assert long["prompt_tokens"] > say()["prompt_tokens"] > short["prompt_tokens"]


def test_a_seed_repeats_a_sample(say):
    sample = ("--temp", 2, "--top-p", 0.99, "--top-k", 100, "--min-p", 0.001)
    first = say(*sample, "--seed", 1, tokens=12)
    assert say(*sample, "--seed", 1, tokens=12) == first
    assert any(say(*sample, "--seed", seed, tokens=12) != first for seed in (2, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-tokens", "0"], ["max_tokens: expected at least 1, found 0"]),
        (["--temp", "-1"], ["temp: expected at least 0, found -1"]),
        (["--temp", "nan"], ["temp: expected at least 0, found nan"]),
        (["--top-p", "1.5"], ["top_p: expected more than 0 and at most 1, found 1.5"]),
        (["--min-p", "1"], ["min_p: expected from 0 to less than 1, found 1"]),
        (["--seed", "-1"], ["seed: expected from 0 to less than 2**64, found -1"]),
        (["--seed", str(2**64)], ["seed: expected from 0 to less than 2**64"]),
        (["--top-k", "512"], ["top_k is too large", "less than the 512 tokens", "found 512"]),
        (["--max-tokens", "0", "--top-k", "-1"], ["max_tokens: expected", "top_k: expected at least 0, found -1"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_settings_out_of_range(options, says, model_folder, expect_refusal):
    expect_refusal("generate", "--model", model_folder, "--prompt", PROMPT, *options, says=says, code=2)
