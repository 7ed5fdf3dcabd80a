"""lm-evaluation-harness on data on disk: the same scores without a server, through one, and by hand."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_afm
from mlx_afm.adapters import LoRAConfig, write_adapter_folder
from mlx_afm.generation.forms import decoder_of
from mlx_afm.generation.loglikelihood import loglikelihoods
from mlx_afm.model_folder import ModelFolder
from mlx_afm.serving import ServeConfig, running
from tiny import random_adapter

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
QUESTIONS = [
    {"question": "copy vome.go to zasu.txt:", "choices": [" cp vome.go zasu.txt", " mv vome.go", " ls"], "answer": 0},
    {"question": "list the files:", "choices": [" rm -r x", " ls -l"], "answer": 1},
    {
        "question": "sort vido.conf in reverse:",
        "choices": [" sort vido.conf", " sort -r vido.conf", " wc"],
        "answer": 1,
    },
    {"question": "remove the folder zuba: ", "choices": ["rm -r zuba", "ls zuba"], "answer": 0},
]
CHOICE = """
task: afm_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: afm_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e", "END"], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """
task: afm_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}{{{{choices[answer]}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
TASKS = ("afm_choice", "afm_answer", "afm_text")


@pytest.fixture(autouse=True, scope="module")
def collect_what_was_left_open():
    """What foreign libraries never close is found here, and not by the collector in the middle of a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    for task, text in zip(TASKS, (CHOICE, ANSWER, TEXT)):
        (folder / f"{task}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("adapters"), ModelFolder(model_folder).config
    for name, seed in (("first", 1), ("second", 2)):
        write_adapter_folder(folder / name, random_adapter(base, LoRAConfig(rank=4, scale=2.0), seed=seed))
    return {name: folder / name for name in ("first", "second")}


@pytest.fixture(scope="module")
def evaluate(tasks):
    """A function that runs the tasks and gives the answers of each, and the scores."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    from lm_eval.tasks import TaskManager

    import mlx_afm.evaluation.lm_eval_model  # noqa: F401

    def run(kind, **settings):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        told = lm_eval.simple_evaluate(
            model=kind, model_args=settings, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, batch_size=1
        )
        answers = {task: [sample["resps"] for sample in told["samples"][task]] for task in TASKS}
        return answers, {task: told["results"][task] for task in TASKS}

    return run


def by_hand(model_folder, adapter):
    """Log probabilities of every choice from the logits of the model itself."""
    model, tokenizer = mlx_afm.load(model_folder, adapter)
    decoder_of(model)  # which lays its matrices out: another order of sums could round a key to the next number
    found = []
    for line in QUESTIONS:
        values = []
        for choice in line["choices"]:
            context, answer = line["question"].rstrip(), line["question"][len(line["question"].rstrip()) :] + choice
            ids, start = tokenizer.encode(context + answer), len(tokenizer.encode(context))
            logits = model(mx.array([ids]))[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            values.append(sum(logprobs[place - 1, ids[place]].item() for place in range(start, len(ids))))
        found.append(values)
    return found


def test_the_same_scores_on_every_way(model_folder, adapters, evaluate):
    with running(model_folder, adapters, ServeConfig(port=0, model_id="base")) as server:
        scores = {}
        for name in ("base", *adapters):
            own = evaluate("mlx-afm", model=str(model_folder), adapter=str(adapters[name]) if name != "base" else None)
            served = evaluate("local-completions", model=name, base_url=f"{server.url}/v1/completions", max_length=4096)
            expected = by_hand(model_folder, adapters.get(name))
            for (one, two), values in zip(zip(own[0]["afm_choice"], served[0]["afm_choice"]), expected):
                assert [resp[0][0] for resp in one] == pytest.approx(values, abs=1e-4)
                assert [resp[0][0] for resp in two] == pytest.approx(values, abs=1e-4)
                assert [resp[0][1] for resp in one] == [resp[0][1] for resp in two]
            assert own[0]["afm_answer"] == served[0]["afm_answer"]
            for one, two in zip(own[0]["afm_text"], served[0]["afm_text"]):
                assert one[0][0] == pytest.approx(two[0][0], abs=1e-4)
            for task in ("afm_choice", "afm_answer", "afm_text"):
                for metric, value in own[1][task].items():
                    assert value == (
                        pytest.approx(served[1][task][metric], abs=1e-4)
                        if isinstance(value, float)
                        else served[1][task][metric]
                    )
            scores[name] = [resp[0][0] for line in own[0]["afm_choice"] for resp in line]
    for one, two in (("base", "first"), ("base", "second"), ("first", "second")):
        assert max(abs(a - b) for a, b in zip(scores[one], scores[two])) > 0.1, "adapters change what is likely"


def test_the_program(model_folder, adapters, tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    program = Path(sys.executable).with_name("mlx-afm-lm-eval")
    settings = f"model={model_folder},adapter={adapters['first']}"
    words = ["--model", "mlx-afm", "--model_args", settings, "--tasks", "afm_choice", "--include_path", tasks]
    ran = subprocess.run(
        [program, *map(str, words), "--output_path", str(tmp_path / "out")], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "afm_choice" in ran.stdout
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert "acc,none" in json.loads(file.read_text())["results"]["afm_choice"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("model=nowhere", "nowhere: no such folder"),
        ("model=MODEL,adapter=nowhere", "nowhere"),
        ("model=MODEL,peft=x", "unknown model_args (expected model, adapter, batch_size, max_length, found peft)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(settings, says, model_folder, tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    program = Path(sys.executable).with_name("mlx-afm-lm-eval")
    words = ["--model", "mlx-afm", "--model_args", settings.replace("MODEL", str(model_folder))]
    words += ["--tasks", "afm_choice", "--include_path", str(tasks)]
    ran = subprocess.run([program, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("mlx-afm-lm-eval: ")
    assert says in last
    assert "Traceback" not in ran.stderr


def test_without_the_library_its_extra_is_named(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError\n")
    code = "from mlx_afm_cli.lm_eval_program import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False)
    assert "pip install 'mlx-afm[lm-eval]'" in ran.stderr


def test_a_context_is_computed_once_for_all_its_continuations(model_folder):
    from mlx_afm.generation import PrefixCache
    from mlx_afm.generation.loglikelihood import iter_loglikelihoods

    model, tokenizer = mlx_afm.load(model_folder)
    context = tokenizer.encode("copy vome.go to zasu.txt " * 12)
    answers = [tokenizer.encode("\n" + text)[2:] for text in ("cp vome.go", "ls", "rm")]
    prefixes = PrefixCache()
    together = dict(iter_loglikelihoods(model, [(context, answer) for answer in answers], prefix_cache=prefixes))
    assert (prefixes.hits, prefixes.misses) == (2, 1)
    for number, answer in enumerate(answers):
        (alone,) = loglikelihoods(model, [(context, answer)])
        assert alone == together[number]
        assert [token.token for token in alone] == answer
