"""The chat page in a real browser, driven by WebDriver, and an event loop that long prompts do not hold."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from experiments.serving.app import Limits, Service
from tests.experiments.test_serve import KEY, Server

browser_needed = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="no chromium and chromedriver are on the path",
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage"
ENTER = "\ue007"


class Page:
    """A browser's only window."""

    def __init__(self, driver, folder):
        options = {
            "goog:chromeOptions": {"args": [*FLAGS.split(), f"--user-data-dir={folder}"]},
            "goog:loggingPrefs": {"performance": "ALL"},
        }
        asked = {"capabilities": {"alwaysMatch": options}}
        found = httpx.post(f"{driver}/session", json=asked, timeout=60).json()["value"]
        self.session = f"{driver}/session/{found['sessionId']}"

    def ask(self, path, **body):
        response = httpx.post(f"{self.session}/{path}", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()["value"]

    def run(self, script, *arguments):
        return self.ask("execute/sync", script=script, args=arguments)

    def devtools(self, method, **parameters):
        return self.ask("goog/cdp/execute", cmd=method, params=parameters)

    def open(self, url):
        self.ask("url", url="about:blank")
        self.ask("url", url=url)

    def say(self, words):
        box = self.ask("element", using="css selector", value="#words")
        self.ask(f"element/{next(iter(box.values()))}/value", text=words + ENTER)

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not (found := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, (condition, self.run("return document.body.innerText"))
            time.sleep(0.02)
        return found

    def finish(self):
        self.until("document.querySelector('#send').textContent === 'Send'")

    def texts(self, kind):
        return self.run(f"return [...document.querySelectorAll('.{kind}')].map(x => x.textContent)")

    def picture(self, path):
        path.write_bytes(base64.b64decode(httpx.get(f"{self.session}/screenshot").json()["value"]))


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Server(checkpoint)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    port = None
    while port is None:
        line = driver.stdout.readline()
        assert line
        port = re.search(r"successfully on port (\d+)", line)
    page = Page(f"http://127.0.0.1:{port[1]}", tmp_path_factory.mktemp("browser"))
    yield page
    httpx.delete(page.session, timeout=60)
    driver.terminate()
    driver.wait(30)
    driver.stdout.close()


@browser_needed
def test_answers_stream_in_as_text_and_turns_keep_their_history(page, server, tmp_path):
    page.open(f"{server.url}/#key={KEY.replace(' ', '%20')}")
    page.run(
        """window.lengths = []; window.sent = [];
        const size = () => document.querySelector('.assistant')?.textContent.length ?? 0;
        new MutationObserver(() => lengths.push(size()))
          .observe(document.querySelector('main'), { childList: true, subtree: true });
        const plain = fetch, short = { max_tokens: 20, temperature: 0, ignore_eos: true };
        window.fetch = (url, asked) => {
          if (!asked?.body) return plain(url, asked);
          sent.push(JSON.parse(asked.body));
          return plain(url, { ...asked, body: JSON.stringify({ ...sent.at(-1), ...short }) });
        };"""
    )
    words = "<img src=x onerror=broken=1>"
    page.say(words)
    page.finish()
    assert len({*page.run("return lengths")}) > 2  # nothing, a part, and all
    page.say("fox")
    page.finish()
    page.picture(tmp_path / "turns.png")
    assert page.texts("user") == [words, "fox"] and not page.texts("error")
    assert page.run("return document.images.length === 0 && window.broken === undefined")
    stats = page.run("return document.querySelector('#stats').textContent")
    assert re.search(r"\d tokens/s", stats) and re.search(r"\d% of drafts", stats)
    history = page.run("return sent.at(-1).messages")
    assert [m["content"] for m in history] == [words, page.texts("assistant")[0], "fox"]
    log = page.ask("se/log", type="performance")
    events = [json.loads(entry["message"])["message"] for entry in log]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {a["request"]["url"] for a in asked if a["documentURL"].startswith(server.url)}
    assert f"{server.url}/v1/chat/completions" in urls
    assert all(url.startswith((server.url, "data:")) for url in urls)


@browser_needed
def test_what_a_model_writes_is_text_and_what_a_server_refuses_is_said(page, server):
    page.open(server.url)
    page.run(
        r"""const told = text => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`;
        const answers = [new Response(told("<b>bold</b>") + told("<img src=x onerror=broken=1>")),
          Response.json({ error: { message: "Too many wait: try again later." } }, { status: 429 })];
        const plain = fetch;
        window.fetch = (url, asked) => asked?.body ? Promise.resolve(answers.shift()) : plain(url, asked);"""
    )
    page.say("one")
    page.finish()
    assert page.texts("assistant") == ["<b>bold</b><img src=x onerror=broken=1>"]
    page.say("two")
    page.finish()
    assert page.texts("error") == ["Too many wait: try again later."]
    assert page.run("return document.images.length === 0 && window.broken === undefined")


@browser_needed
def test_stop_frees_the_slot(page, server):
    page.open(f"{server.url}/#key={KEY.replace(' ', '%20')}")
    page.run(
        """const plain = fetch;  // an answer that lasts until it is stopped
        window.fetch = (url, asked) => plain(url, asked?.body
          ? { ...asked, body: JSON.stringify({ ...JSON.parse(asked.body), ignore_eos: true }) } : asked);"""
    )
    page.say("hello")
    page.until("document.querySelector('#send').textContent === 'Stop'")
    page.run("document.querySelector('#send').click()")
    page.finish()
    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}/health").json()["active"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not page.texts("error")


@browser_needed
def test_an_error_is_a_sentence_and_gives_the_words_back(page, server, tmp_path):
    page.open(f"{server.url}/#key=wrong")
    page.say("hello")
    page.finish()
    assert page.texts("error") == ["The API key is not right: send it as Authorization: Bearer KEY."]
    assert page.run("return document.querySelector('#words').value") == "hello"
    assert page.run("return document.querySelector('.error').getAttribute('role')") == "alert"
    page.picture(tmp_path / "error.png")


@browser_needed
def test_a_narrow_dark_screen_holds_the_page(page, server, tmp_path):
    size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.devtools("Emulation.setDeviceMetricsOverride", **size)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.devtools("Emulation.setEmulatedMedia", features=dark)
    page.open(f"{server.url}/#key=wrong")
    page.say("x" * 200)
    page.finish()
    page.picture(tmp_path / "phone.png")
    assert page.run("return document.documentElement.scrollWidth <= 320")
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_health_answers_while_a_prompt_is_encoded(path):
    began, go_on = threading.Event(), threading.Event()

    def encode(_):
        began.set()
        assert go_on.wait(30)
        return np.zeros(100, np.int32)

    load = SimpleNamespace(active=0, waiting=0)
    service = Service(
        worker=SimpleNamespace(load=load, healthy=True),
        text=SimpleNamespace(encode=encode, encode_marked=encode),
        template=lambda messages: "words",
        bos=[],
        name="tiny",
        limits=Limits(length=10),
    )

    async def both():
        transport = httpx.ASGITransport(service.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
            kind = "prompt" if path == "completions" else "messages"
            answer = asyncio.create_task(http.post(f"/v1/{path}", json={kind: asked[kind], "max_tokens": 1}))
            try:
                assert await asyncio.to_thread(began.wait, 30)
                health = await http.get("/health")
                assert health.status_code == 200 and not go_on.is_set() and not answer.done()
            finally:
                go_on.set()
            assert "prompt of 100 tokens" in (await answer).json()["error"]["message"]

    asyncio.run(both())
