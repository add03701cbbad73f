"""The engine's thread: what happens to those who wait when it breaks, is full, or is told to stop."""

import contextlib
import queue
import threading

import jax
import pytest

from dsv3_jax.inference.engine import Counts, News, Request
from experiments.serving.worker import Full, Stopped, Worker
from tests.conftest import mesh_of

ASKED = Request(prompt=[1], most=2)


class Engine:
    """Gives a token a step to every request, when it is let to."""

    counts = Counts()

    def __init__(self):
        self.requests, self.gate, self.broken = {}, threading.Semaphore(0), False

    @property
    def active(self):
        return len(self.requests)

    waiting = 0

    def submit(self, request):
        if request.most > 9:
            raise ValueError("too many")
        number = max(self.requests, default=0) + 1
        self.requests[number] = 0
        return number

    def cancel(self, number):
        del self.requests[number]

    def step(self):
        if not self.requests:
            return []
        self.gate.acquire()
        if self.broken:
            raise RuntimeError("broken")
        given = {n: count + 1 for n, count in self.requests.items()}
        self.requests = {n: count for n, count in given.items() if count < 2}
        return [News(n, [7], [0.0], count == 2) for n, count in given.items()]


@pytest.fixture
def worked():
    engine = Engine()
    with jax.set_mesh(mesh_of(1, 1)):
        worker = Worker(lambda: contextlib.nullcontext(engine), 2)
    yield engine, worker
    engine.gate.release(1000)
    worker.stop()
    assert not worker.healthy
    with pytest.raises(Stopped):
        worker.submit(ASKED, print)


def test_news_goes_to_who_asked_and_room_comes_back(worked):
    engine, worker = worked
    engine.gate.release(1000)
    for _ in range(5):
        heard = queue.Queue()
        worker.submit(ASKED, heard.put)
        assert [heard.get(timeout=10).finished for _ in range(2)] == [False, True]


def test_more_than_may_be_are_refused_until_one_is_cancelled(worked):
    _, worker = worked
    cancel = worker.submit(ASKED, print)
    worker.submit(ASKED, print)
    with pytest.raises(Full):
        worker.submit(ASKED, print)
    cancel()
    cancel()  # nothing is forgotten twice
    worked[0].gate.release()
    heard = queue.Queue()
    while True:
        try:
            worker.submit(ASKED, heard.put)
            break
        except Full:
            pass
    with pytest.raises(Full):
        worker.submit(ASKED, print)


def test_a_request_that_the_engine_refuses_takes_no_room(worked):
    _, worker = worked
    for _ in range(5):
        heard = queue.Queue()
        worker.submit(Request(prompt=[1], most=10), heard.put)
        assert isinstance(heard.get(timeout=10), ValueError)


def test_when_the_engine_breaks_all_are_told(worked):
    engine, worker = worked
    first, second = queue.Queue(), queue.Queue()
    worker.submit(ASKED, first.put)
    engine.broken = True
    worker.submit(ASKED, second.put)
    engine.gate.release()
    assert isinstance(first.get(timeout=10), Stopped) and isinstance(second.get(timeout=10), Stopped)


def test_an_engine_that_cannot_be_made_is_not_healthy():
    with jax.set_mesh(mesh_of(1, 1)):
        worker = Worker(lambda: [][0], 2)
    worker.stop()
    assert not worker.healthy
