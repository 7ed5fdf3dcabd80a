"""Programs that people use with OpenAI's API, against a running server: the answers are those of `generate`."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pydantic
import pytest

from serving_client import REQUESTS, SYSTEM, chat

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True, scope="module")
def collect_what_was_left_open():
    """What foreign libraries never close is found here, and not by the collector in the middle of a later test."""
    yield
    gc.collect()


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    old: bool


def test_litellm(server, alone):
    litellm = pytest.importorskip("litellm", reason="needs the clients extra")
    settings = {"api_base": f"{server.url}/v1", "api_key": "none", "max_tokens": 24, "messages": chat(REQUESTS[0])}
    for model in ("base", "small"):
        answer = litellm.completion(model=f"openai/{model}", **settings)
        assert answer.choices[0].message.content == alone(model, REQUESTS[0], max_tokens=24)
        chunks = litellm.completion(model=f"openai/{model}", stream=True, **settings)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_langchain(server, alone):
    langchain = pytest.importorskip("langchain_openai", reason="needs the clients extra")
    for responses in (False, True):
        model = langchain.ChatOpenAI(
            model="some", base_url=f"{server.url}/v1", api_key="none", max_tokens=24, use_responses_api=responses
        )
        messages = [("system", SYSTEM), ("human", REQUESTS[1])]
        answer = model.invoke(messages)
        assert answer.text == alone("some", REQUESTS[1], max_tokens=24)
        assert "".join(chunk.text for chunk in model.stream(messages)) == answer.text
        again = model.invoke([*messages, answer, ("human", REQUESTS[2])])
        assert again.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]


def test_instructor(server):
    instructor = pytest.importorskip("instructor", reason="needs the clients extra")
    pytest.importorskip("llguidance", reason="needs the guided extra")
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
            asked = instructor.from_openai(client, mode=mode)
            person = asked.chat.completions.create(
                model="base", messages=chat("who is it"), response_model=Person, max_tokens=100
            )
            assert isinstance(person, Person)


def test_llm(server, alone, tmp_path):
    """Simon Willison's program, with models in its configuration file."""
    pytest.importorskip("llm", reason="needs the clients extra")
    model = {"model_id": "here", "model_name": "small", "api_base": f"{server.url}/v1"}
    lines = "".join(f"  {key}: {value}\n" for key, value in model.items())
    (tmp_path / "extra-openai-models.yaml").write_text("-" + lines[1:])
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    program = Path(sys.executable).with_name("llm")
    words = ["-m", "here", "-s", SYSTEM, "-o", "max_tokens", "24"]
    for extra in ([], ["--no-stream"]):
        ran = subprocess.run(
            [program, *words, *extra, REQUESTS[0]], env=environment, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.rstrip("\n") == alone("small", REQUESTS[0], max_tokens=24)


def test_httpx_keeps_its_connection(server, alone):
    opened = []
    with httpx.Client(
        base_url=server.url,
        timeout=60,
        event_hooks={"response": [lambda r: opened.append(r.extensions["network_stream"])]},
    ) as client:
        for number in range(20):
            model, text = ("base", "small", "whole")[number % 3], REQUESTS[number % len(REQUESTS)]
            body = {"model": model, "messages": chat(text), "max_tokens": 12}
            if number % 4 == 0:
                assert client.head("/v1/models").content == b""
            if number % 4 == 1:
                assert client.post(CHAT, json={**body, "wrong": 1}).status_code == 400
            if number % 4 == 2:
                with client.stream("POST", CHAT, json={**body, "stream": True}) as stream:
                    lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
                chunks = [json.loads(line) for line in lines[:-1]]
                said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            else:
                said = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
            assert said == alone(model, text, max_tokens=12)
    assert len({id(stream) for stream in opened}) == 1, "one connection for all"
