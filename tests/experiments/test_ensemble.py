"""Text is written and served by several processes as by one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from dsv3_jax.inference.request import Counts, News, Request
from experiments.serving.ensemble import Leader, follow
from tests.conftest import ROOT
from tests.experiments.conftest import WORDS


class Engine:
    """Notes what it is asked, and gives a token for each step, in which all take part."""

    counts, waiting = Counts(), 0

    def __init__(self, together):
        self.asked, self.running, self.together = [], {}, together

    @property
    def active(self):
        return len(self.running)

    def submit(self, request):
        if request.most > 9:
            raise ValueError("too many")
        self.asked.append(request)
        self.running[len(self.asked)] = request
        return len(self.asked)

    def cancel(self, number):
        self.asked.append(number)
        self.running.pop(number, None)

    def step(self):
        self.asked.append("step")
        self.together.wait(10)
        return [News(n, [1], [0.0], False) for n in self.running]


class Memory(dict):
    """A store that waits."""

    def __init__(self):
        self.changed = threading.Condition()

    def put(self, key, value):
        with self.changed:
            assert key not in self
            self[key] = value
            self.changed.notify_all()

    def get(self, key):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self, 10)
            return self[key]

    remove = dict.__delitem__


def test_followers_do_what_the_leader_is_asked_and_the_store_stays_small():
    together = threading.Barrier(2)
    engines, store = [Engine(together), Engine(together)], Memory()
    leader = Leader(engines[0], store)
    follower = threading.Thread(target=follow, args=(engines[1], store))
    follower.start()
    a = leader.submit(Request(prompt=[1, 2], most=3, ends=(0,), temperature=0.5, seed=7))
    with pytest.raises(ValueError, match="too many"):
        leader.submit(Request(prompt=[1], most=10))
    assert leader.step() == [News(a, [1], [0.0], False)]
    b = leader.submit(Request(prompt=[3], most=3))
    leader.cancel(a)
    assert [news.number for news in leader.step()] == [b]
    assert len(store) == 0 and leader.active == 1
    leader.close()
    follower.join(10)
    assert not follower.is_alive()
    asked = engines[1].asked
    assert [request if not isinstance(request, Request) else list(request.prompt) for request in asked] == [
        [1, 2], "step", [3], a, "step",
    ]  # fmt: skip
    assert asked[0].temperature == 0.5 and asked[0].seed == 7 and tuple(asked[0].ends) == (0,)


def start(program, checkpoint, *arguments, processes=2):
    """The processes of one run, with a device each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", program, f"--checkpoint={checkpoint}", *arguments]
    command += [f"--mesh_expert={processes}", "--precision=float32"]
    launch = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    launch |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            command,
            env=os.environ | launch | {"JAX_PROCESS_ID": str(n)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for n in range(processes)
    ]


@pytest.mark.slow
def test_two_processes_write_and_serve_the_text_of_one(checkpoint, tmp_path):
    lines = [{"prompt": WORDS}, {"prompt": "fox"}, {"tokens": [5, 6, 7]}]
    source, out, alone = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "alone.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for processes, target in ((1, alone), (2, out)):
        arguments = f"--input={source}", f"--output={target}", "--max_tokens=10", "--speculative"
        written = start("experiments.generate", checkpoint, *arguments, processes=processes)
        said = [process.communicate(timeout=300) for process in written]
        assert not any(process.returncode for process in written), said
    results, want = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, alone))
    assert [r["tokens"] for r in results] == [w["tokens"] for w in want]

    first, second = start("experiments.serve", checkpoint, "--port=0", "--slots=2")
    try:
        for line in first.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        drains = [threading.Thread(target=pipe.read) for pipe in (first.stderr, second.stderr)]
        for drain in drains:
            drain.start()
        for _ in range(2):
            body = {"model": "ours", "prompt": "fox", "max_tokens": 10, "temperature": 0}
            answer = httpx.post(f"{found[1]}/v1/completions", json=body, timeout=120).json()
            assert answer["choices"][0]["text"] == want[1]["text"]
        for process in (second, first):  # as a cluster tells all of them
            process.send_signal(signal.SIGTERM)
        assert (first.wait(60), second.wait(60)) == (0, 0)
    finally:
        for process in (first, second):
            process.kill()
            process.stdout.close()
        for drain in drains:
            drain.join()
        for process in (first, second):
            process.stderr.close()
