"""The thread that owns an engine: requests come in from anywhere, and news goes back to who asked."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.request import Counts, News, Request
from experiments.serving.ensemble import Leader

Listener = Callable[[News | Exception], None]  # called on the engine's thread; must return at once


class Full(Exception):
    """There are as many requests as may be."""


class Stopped(Exception):
    """No request is taken any more."""


@dataclass(frozen=True)
class Load:
    """What an engine is busy with."""

    active: int
    waiting: int
    counts: Counts


class Worker:
    """Runs an engine on a thread of its own, which ends when `stop` is called."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[Engine | Leader]], most: int):
        """Starts the thread, which makes the engine under the mesh that is set here.

        Args:
            make: gives it for as long as it is used.
            most: requests that are not over, of which some have slots.
        """
        self._make, self._most = make, most
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._unfinished = 0  # submitted, and not known to be over
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._load = Load(0, 0, Counts())
        self._thread = threading.Thread(target=self._run, args=(jax.sharding.get_mesh(),), daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """As it was after the engine's last step."""
        return self._load

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def submit(self, request: Request, listen: Listener) -> Callable[[], None]:
        """Hands a request over and gives what cancels it; news, or the error that ends it, go to `listen`.

        Raises:
            Full: if too many wait.
            Stopped: if the worker takes none any more.
        """
        ticket = _Ticket(request, listen)
        with self._lock:
            if not self.healthy:
                raise Stopped
            if self._unfinished >= self._most:
                raise Full
            self._unfinished += 1
            self._calls.put(partial(self._begin, ticket))
        return lambda: self._calls.put(partial(self._forget, ticket))

    def stop(self) -> None:
        """Ends the thread; whoever waits is told."""
        self._stopping.set()
        self._calls.put(lambda: None)
        self._thread.join()

    def _run(self, mesh: jax.sharding.Mesh) -> None:
        try:
            with jax.set_mesh(mesh), self._make() as self._engine:
                while not self._stopping.is_set():
                    self._turn()
        except Exception:  # all are told, and health says so
            logging.exception("The engine is broken: nothing is answered any more.")
        with self._lock:
            self._stopping.set()
        for listen in list(self._listeners.values()):
            listen(Stopped())
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def _turn(self) -> None:
        engine = self._engine
        busy = engine.active or engine.waiting
        try:
            call = self._calls.get(block=not busy)
            while True:
                call()
                call = self._calls.get_nowait()
        except queue.Empty:
            pass
        for news in engine.step():
            self._listeners[news.number](news)
            if news.finished:
                self._over(news.number)
        self._load = Load(engine.active, engine.waiting, engine.counts)

    def _begin(self, ticket: "_Ticket") -> None:
        if ticket.over:
            return
        if self._stopping.is_set():
            return ticket.listen(Stopped())
        try:
            ticket.number = self._engine.submit(ticket.request)
        except ValueError as error:
            ticket.over = True
            self._less()
            ticket.listen(error)
        else:
            self._listeners[ticket.number] = ticket.listen

    def _forget(self, ticket: "_Ticket") -> None:
        if ticket.number in self._listeners and not self._stopping.is_set():
            self._engine.cancel(ticket.number)
            self._over(ticket.number)
        elif ticket.number is None and not ticket.over:
            ticket.over = True
            self._less()

    def _over(self, number: int) -> None:
        del self._listeners[number]
        self._less()

    def _less(self) -> None:
        with self._lock:
            self._unfinished -= 1


@dataclass
class _Ticket:
    request: Request
    listen: Listener
    number: int | None = None
    over: bool = False
