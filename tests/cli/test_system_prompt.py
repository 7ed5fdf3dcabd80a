"""The system prompt means the same in training and in use, and an adapter brings its own along."""

import json

import pytest

import mlx_afm
from mlx_afm.text.template import DEFAULT_SYSTEM

TASK = "Answer with one shell command."
ASKED = "list the files in docs"
QUESTION = {"role": "user", "content": ASKED}
ANSWER = {"role": "assistant", "content": "box list docs"}
NONE = (["--system-prompt", ""], ["--no-system-prompt"])


def length(folder, *messages):
    """Tokens of a prompt of exactly these messages, without any system prompt but their own."""
    _, tokenizer = mlx_afm.load(folder)
    tokenizer.system_prompt = None
    return len(tokenizer.apply_chat_template(list(messages)))


def with_system(text):
    return ({"role": "system", "content": text}, QUESTION)


@pytest.fixture
def trained_with(adapter_forms, copy_of, edit_json):
    """A function that gives an adapter folder which names these system prompts."""

    def make(*prompts, name="trained"):
        folder = copy_of(adapter_forms["folder"], name)
        edit_json(folder / "adapter_config.json", system_prompts=list(prompts))
        return folder

    return make


@pytest.fixture
def train(cli, model_folder, tmp_path):
    """A function that trains one step on conversations and gives the system prompts in the adapter."""

    def run(conversations, *options, name="run"):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(turns) + "\n" for turns in conversations))
        out = tmp_path / name
        ran = cli("lora", "--train", "--model", model_folder, "--data", data, "--adapter-path", out, "--iters", 1,
                  "--batch-size", 1, "--no-cache", "--json", *options)  # fmt: skip
        assert ran.code == 0, ran.err
        return json.loads((out / "adapter_config.json").read_text())["system_prompts"]

    return run


def test_training_records_the_system_prompts_of_its_data(train):
    plain, own = [QUESTION, ANSWER], [*with_system(TASK), ANSWER]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    with_tools = [{"role": "system", "content": TASK, "tools": tools}, QUESTION, ANSWER]
    assert train([plain], name="a") == [DEFAULT_SYSTEM]
    assert train([plain], "--system-prompt", TASK, name="b") == [TASK]
    assert train([own, with_tools], name="c") == [TASK]
    assert train([plain, own, own], name="d") == [TASK, DEFAULT_SYSTEM]
    for number, options in enumerate(NONE):
        assert train([plain], *options, name=f"none{number}") == [None]


def test_no_system_prompt_in_a_yaml_file_and_over_one(train, tmp_path):
    (tmp_path / "none.yaml").write_text("no_system_prompt: true\n")
    (tmp_path / "text.yaml").write_text(f"system_prompt: {TASK}\n")
    plain = [QUESTION, ANSWER]
    assert train([plain], "-c", tmp_path / "none.yaml", name="a") == [None]
    assert train([plain], "-c", tmp_path / "text.yaml", name="b") == [TASK]
    assert train([plain], "-c", tmp_path / "text.yaml", "--no-system-prompt", name="c") == [None]
    assert train([plain], "-c", tmp_path / "none.yaml", "--system-prompt", TASK, name="d") == [TASK]


def test_generate_sends_the_system_prompt_that_was_asked_for(say, model_folder):
    def tokens(*options):
        return say(*options, prompt=ASKED)["prompt_tokens"]

    assert tokens() == length(model_folder, *with_system(DEFAULT_SYSTEM))
    assert tokens("--system-prompt", TASK) == length(model_folder, *with_system(TASK))
    for options in NONE:
        assert tokens(*options) == length(model_folder, QUESTION)


def test_generate_uses_the_one_system_prompt_of_the_adapter(say, model_folder, trained_with):
    task, bare = trained_with(TASK), trained_with(None, name="bare")
    found = {name: say("--adapter-path", path, prompt=ASKED) for name, path in (("task", task), ("bare", bare))}
    assert found["task"]["prompt_tokens"] == length(model_folder, *with_system(TASK))
    assert found["bare"]["prompt_tokens"] == length(model_folder, QUESTION)
    assert found["task"]["text"] == mlx_afm.generate(
        *mlx_afm.load(model_folder, task), list(with_system(TASK)), max_tokens=8
    )
    told = say("--adapter-path", task, "--system-prompt", "Be brief.", prompt=ASKED)
    assert told["prompt_tokens"] == length(model_folder, *with_system("Be brief."))
    for options in NONE:
        assert say("--adapter-path", task, *options, prompt=ASKED)["prompt_tokens"] == length(model_folder, QUESTION)


def test_python_uses_it_too(model_folder, trained_with):
    model, tokenizer = mlx_afm.load(model_folder, trained_with(TASK))
    assert tokenizer.system_prompt == TASK
    asked = mlx_afm.generate(model, tokenizer, list(with_system(TASK)), max_tokens=8)
    assert mlx_afm.generate(model, tokenizer, ASKED, max_tokens=8) == asked
    assert mlx_afm.batch_generate(model, tokenizer, [ASKED], max_tokens=8)[0].text == asked
    assert mlx_afm.load(model_folder)[1].system_prompt == DEFAULT_SYSTEM


def test_several_system_prompts_are_a_warning_and_the_models_own_is_used(cli, model_folder, trained_with):
    several = trained_with(TASK, None)
    line = ("generate", "--model", model_folder, "--adapter-path", several, "-p", ASKED, "-m", 4, "--json")
    ran = cli(*line)
    assert "trained with 2 system prompts" in ran.err
    assert str(several) in ran.err
    assert ran.json["prompt_tokens"] == length(model_folder, *with_system(DEFAULT_SYSTEM))
    assert cli(*line, "--no-system-prompt").err == ""


def test_a_file_of_prompts(cli, model_folder, trained_with, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{json.dumps({'prompt': ASKED})}\n{json.dumps(with_system('Be brief.'))}\n")
    wanted = {"own": (TASK, []), "none": (None, ["--no-system-prompt"]), "given": ("Go.", ["--system-prompt", "Go."])}
    for name, (text, options) in wanted.items():
        out = tmp_path / f"{name}.out.jsonl"
        ran = cli("generate", "--model", model_folder, "--adapter-path", trained_with(TASK, name=name), "-p", prompts,
                  "--output", out, "-m", 4, *options)  # fmt: skip
        assert ran.code == 0, ran.err
        counts = [json.loads(line)["prompt_tokens"] for line in out.read_text().splitlines()]
        first = (QUESTION,) if text is None else with_system(text)
        assert counts == [length(model_folder, *first), length(model_folder, *with_system("Be brief."))]


def test_chat_uses_it_and_changes_it_with_the_adapter(cli, model_folder, trained_with):
    def counts(*lines, options=()):
        ran = cli("chat", "--model", model_folder, "-m", 4, "--json", "--adapter", f"task={trained_with(TASK)}",
                  *options, stdin="".join(f"{line}\n" for line in lines).encode())  # fmt: skip
        return [json.loads(line)["prompt_tokens"] for line in ran.out.splitlines()], ran.err

    own = length(model_folder, *with_system(DEFAULT_SYSTEM))
    task, none = length(model_folder, *with_system(TASK)), length(model_folder, QUESTION)
    lines = [
        ASKED,
        "/reset",
        "/adapter task",
        ASKED,
        "/reset",
        "/system none",
        ASKED,
        "/reset",
        "/system default",
        ASKED,
    ]
    found, said = counts(*lines)
    assert found == [own, task, none, task]
    assert "(system message: none)" in said
    assert f"(system message: {TASK})" in said


@pytest.mark.parametrize("options", NONE)
def test_chat_without_a_system_turn(cli, model_folder, options):
    ran = cli("chat", "--model", model_folder, "-m", 4, "--json", *options, stdin=f"{ASKED}\n".encode())
    assert json.loads(ran.out)["prompt_tokens"] == length(model_folder, QUESTION)


@pytest.mark.parametrize("options", NONE)
def test_data_render_shows_no_system_turn(cli, tmp_path, model_folder, options):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps([QUESTION, ANSWER]) + "\n")
    assert DEFAULT_SYSTEM in cli("data", "render", data, "--model", model_folder).out
    assert "system" not in cli("data", "render", data, "--model", model_folder, *options).out.replace(str(tmp_path), "")
    assert cli("data", "stats", data, "--model", model_folder, *options).code == 0
    assert cli("data", "check", data, "--model", model_folder, *options).code == 0


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "lora"])
def test_both_options_contradict_each_other(cli, model_folder, command):
    more = {"generate": ["-p", "x"], "lora": ["--train", "--data", "nowhere"]}.get(command, [])
    ran = cli(command, "--model", model_folder, "--system-prompt", TASK, "--no-system-prompt", *more)
    assert ran.code == 2
    assert "contradict" in ran.err


@pytest.mark.parametrize("text", ["<turn_end>", "x<executable_start>"])
def test_a_system_prompt_with_a_special_token_is_refused(expect_refusal, model_folder, text):
    expect_refusal(
        "generate", "--model", model_folder, "-p", "x", "--system-prompt", text, says=["special token"], code=2
    )


def test_the_test_loss_is_taken_under_the_system_prompt_of_the_adapter(cli, model_folder, trained_with, tmp_path):
    bare, told = tmp_path / "bare", tmp_path / "told"
    for folder, turns in ((bare, [QUESTION, ANSWER]), (told, [*with_system(TASK), ANSWER])):
        folder.mkdir()
        (folder / "test.jsonl").write_text(json.dumps(turns) + "\n")
        (folder / "train.jsonl").write_text(json.dumps(turns) + "\n")

    def loss(data, *options):
        line = ("lora", "--test", "--model", model_folder, "--adapter-path", adapter, "--data", data, "--json")
        return cli(*line, "--no-cache", *options).json["test_loss"]

    adapter = trained_with(TASK)
    assert loss(bare) == loss(told)
    assert loss(bare, "--no-system-prompt") != loss(told)


def test_a_fused_folder_keeps_it(say, cli, model_folder, trained_with, tmp_path):
    fused = tmp_path / "fused"
    line = ("fuse", "--model", model_folder, "--adapter-path", trained_with(TASK), "--save-path", fused)
    assert cli(*line).code == 0
    assert say(model=fused, prompt=ASKED)["prompt_tokens"] == length(model_folder, *with_system(TASK))
    if (fused / "chat_template.jinja").is_file():
        assert TASK in (fused / "chat_template.jinja").read_text()


def test_packages_carry_it_and_a_pt_says_that_it_cannot(say, cli, model_folder, trained_with, tmp_path):
    adapter, wanted = trained_with(TASK), length(model_folder, *with_system(TASK))
    for name in ("p.fmadapter", "again", "p.pt"):
        source = tmp_path / "p.fmadapter" if name == "again" else adapter
        ran = cli("adapter", "convert", source, tmp_path / name, "--model", model_folder)
        assert ran.code == 0, ran.err
        assert ("cannot hold the system prompt" in ran.err) == (name == "p.pt")
    assert say("--adapter-path", tmp_path / "p.fmadapter", prompt=ASKED)["prompt_tokens"] == wanted
    assert say("--adapter-path", tmp_path / "again", prompt=ASKED)["prompt_tokens"] == wanted
    own = length(model_folder, *with_system(DEFAULT_SYSTEM))
    assert say("--adapter-path", tmp_path / "p.pt", prompt=ASKED)["prompt_tokens"] == own


def test_system_prompts_of_another_form_are_refused(expect_refusal, model_folder, trained_with, edit_json):
    adapter = trained_with(TASK)
    edit_json(adapter / "adapter_config.json", system_prompts="x")
    says = [adapter / "adapter_config.json", "a list of texts and nulls"]
    expect_refusal("generate", "--model", model_folder, "--adapter-path", adapter, "-p", "x", says=says)
