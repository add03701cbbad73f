"""The server as its clients see it: OpenAI's own client, many at once, rude ones, and an operator."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from dsv3_jax.data.tokenizer import Tokenizer
from tests.conftest import ROOT

KEY = "key of this test"
PROMPTS = ["the quick brown", "fox", "lazy dog and then", "some jumps over"]


class Server:
    """A process that serves, and what it has said."""

    def __init__(self, checkpoint, *arguments, key=KEY):
        command = [sys.executable, "-m", "experiments.serve", f"--checkpoint={checkpoint}", "--port=0"]
        command += ["--precision=float32", "--slots=4", "--name=tiny", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        environment |= {"DSV3_API_KEY": key} if key else {}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        self.said = []
        self.url = None
        while self.url is None:
            line = self.process.stderr.readline()
            assert line, "".join(self.said)
            self.said.append(line)
            found = re.search(r"running on (http://\S+)", line)
            self.url = found and found[1]
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr))
        self.reader.start()
        self.headers = {"Authorization": f"Bearer {key}"}

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.reader.join()
        self.process.stderr.close()
        assert code == 0 and "Finished server process" in self.said[-1], "".join(self.said)

    def memory(self):
        with open(f"/proc/{self.process.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Server(checkpoint, "--most_requests=300", "--most_bytes=20000")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(client):
    """What each prompt is answered when nothing else runs."""
    return [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, seed=1)
        for prompt in PROMPTS
    ]


def test_completions_through_the_official_client(client, alone, checkpoint):
    text = Tokenizer.load(checkpoint / "tokenizer.json")
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        assert answer.usage.prompt_tokens == len(text.encode(prompt))
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage.completion_tokens == 12 or answer.choices[0].finish_reason == "stop"
    together = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12, temperature=0)
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    ids = client.completions.create(
        model="tiny", prompt=text.encode(PROMPTS[0]).tolist(), max_tokens=12, temperature=0, logprobs=0
    )
    assert ids.choices[0].text == alone[0].choices[0].text
    assert len(ids.choices[0].logprobs.token_logprobs) == ids.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streams_join_to_the_answer_and_count_their_tokens(client, alone):
    stream = client.completions.create(
        model="tiny", prompt=PROMPTS[2], max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == alone[2].choices[0].text
    assert chunks[-1].usage.completion_tokens == alone[2].usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == alone[2].choices[0].finish_reason


def test_chat_goes_through_the_template_and_streams(client):
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=10, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == whole.choices[0].message.content
    assert whole.usage.prompt_tokens > 1


def test_a_seed_fixes_a_draw_and_texts_of_one_prompt_differ(client):
    asked = dict(model="tiny", prompt="fox", max_tokens=16, temperature=1.5, seed=5, n=3)
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3


def test_a_stop_string_ends_a_text_before_it(client, alone):
    text = max((answer.choices[0].text for answer in alone), key=len)
    prompt = next(p for p, answer in zip(PROMPTS, alone, strict=True) if answer.choices[0].text == text)
    stop = text[3:5]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


BAD = [
    (b"{", 400, "not JSON"),
    (b"[1]", 400, "valid dictionary"),
    (b"[" * 15000, 400, "not JSON"),
    (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1000}', 400, "within 1 to 128"),
    (b'{"prompt": "a", "temperature": -1}', 400, "temperature"),
    (b'{"prompt": ""}', 400, "within 1 to 128"),
    (b'{"prompt": [299, 300]}', 400, "ids are from 0 to 299"),
    (b'{"prompt": [300], "stream": true}', 400, "ids are from 0 to 299"),
    (b'{"prompt": "a", "model": "other"}', 404, "no model 'other'"),
    (b'{"prompt": "' + b"a" * 20000 + b'"}', 413, "more than 20000 bytes"),
    (b"\xff\xfe", 400, "not JSON"),
    (b'{"prompt": "\\ud800"}', 400, "surrogates"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    (b'{"prompt": "a", "top_k": 99999999999}', 400, "top_k"),
    (b'{"prompt": "a", "stop": "\\ud800"}', 400, "surrogates"),
    (b'{"prompt": [99999999999]}', 400, "ids are from 0 to 299"),
]


@pytest.mark.parametrize(("body", "status", "said"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_answered_is_refused_in_a_sentence(server, body, status, said):
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=server.headers, timeout=60)
    assert response.status_code == status and said in response.json()["error"]["message"]


def test_the_page_stands_on_its_own(server):
    response = httpx.get(server.url)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "http" not in response.text.replace("http-equiv", "") and "src=" not in response.text


def test_without_the_key_nothing_is_answered(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00e9".encode()}):
        for method, path in (("POST", "completions"), ("POST", "chat/completions"), ("GET", "models")):
            url = f"{server.url}/v1/{path}"
            response = httpx.request(method, url, headers=headers, json=None if method == "GET" else {})
            assert response.status_code == 401


def test_many_at_once_with_rude_ones_among_them_lose_and_mix_nothing(server, alone):
    want = [answer.choices[0].text for answer in alone]
    rng = random.Random(0)
    kinds = [rng.choice(["whole", "stream", "cancel", "bad"]) for _ in range(200)]

    async def one(http, number, kind):
        which = number % len(PROMPTS)
        asked = {"prompt": PROMPTS[which], "max_tokens": 12, "temperature": 0}
        if kind == "bad":
            response = await http.post("/v1/completions", content=rng.choice(BAD)[0])
            return response.status_code in (400, 404, 413)
        if kind == "whole":
            response = await http.post("/v1/completions", json=asked)
            return response.json()["choices"][0]["text"] == want[which]
        text = ""
        async with http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if kind == "cancel" and rng.random() < 0.5:
                    return True
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text == want[which]

    async def everyone():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=server.url, headers=server.headers, timeout=300, limits=limits
        ) as http:
            return await asyncio.gather(*(one(http, n, kind) for n, kind in enumerate(kinds)))

    assert all(asyncio.run(everyone()))
    before = server.memory()
    for _ in range(2):
        assert all(asyncio.run(everyone()))
    assert server.memory() < 1.1 * before + 20e6
    deadline = time.monotonic() + 60
    while (health := httpx.get(f"{server.url}/health").json())["active"] + health["waiting"]:
        assert time.monotonic() < deadline, health
        time.sleep(0.2)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'dsv3_requests_total{status="200"}' in metrics
    assert float(re.search(r"^dsv3_drafts_total (\S+)$", metrics, re.M)[1]) > 0


def test_overload_is_answered_at_once_and_sigterm_lets_answers_end(checkpoint):
    server = Server(checkpoint, "--most_requests=2", key=None)
    url, results = f"{server.url}/v1/completions", []
    asked = {"prompt": "fox", "max_tokens": 120, "temperature": 1.0, "ignore_eos": True}

    def ask():
        results.append(httpx.post(url, json=asked, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(results) < 4:
        time.sleep(0.01)
    assert [r.status_code for r in results[:4]] == [429] * 4
    assert results[0].headers["Retry-After"] == "1"
    server.stop()
    for thread in threads:
        thread.join(60)
    assert sorted(r.status_code for r in results) == [200, 200, 429, 429, 429, 429]
    assert all(r.json()["usage"]["completion_tokens"] == 120 for r in results if r.status_code == 200)
