"""One engine in several processes: the first is asked, and all do the same.

Devices of a mesh work together where every process calls the same programs in the same order. What the first
engine is asked before each step stands in the store that `jax.distributed` keeps; the others read it there,
do the same, and wait for the next without keeping a device busy.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, Protocol

import jax
from jax._src import distributed  # the only way to the store, which has no public name

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.request import Counts, News, Request

_PATIENCE = 60.0  # seconds that a process waits for the store before it asks again


class Store(Protocol):
    """Values by key that all processes see."""

    def put(self, key: str, value: bytes) -> None:
        """A new one."""
        ...

    def get(self, key: str) -> bytes:
        """It, once it is there."""
        ...

    def remove(self, key: str) -> None:
        """It is asked for no more."""
        ...


class Leader:
    """The first process's engine, which the others follow."""

    def __init__(self, engine: Engine, store: Store):
        """Nothing was asked so far."""
        self._engine, self._store = engine, store
        self._asked: list[tuple[str, Any]] = []
        self._turn = self._first = 0  # the next, and the oldest that the store still has

    @property
    def active(self) -> int:
        """Requests in slots."""
        return self._engine.active

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._engine.waiting

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._engine.counts

    def submit(self, request: Request) -> int:
        """As of an engine; what it refuses the others are not asked.

        Raises:
            ValueError: if it can never be served.
        """
        number = self._engine.submit(request)
        self._asked.append(("submit", dataclasses.asdict(request)))
        return number

    def cancel(self, number: int) -> None:
        """As of an engine."""
        self._engine.cancel(number)
        self._asked.append(("cancel", number))

    def step(self) -> list[News]:
        """As of an engine, in all processes."""
        self._publish(self._asked)
        self._asked = []
        news = self._engine.step()
        if news:  # to which all devices have given a part, so that all processes have read so far
            for turn in range(self._first, self._turn):
                self._store.remove(_key(turn))
            self._first = self._turn
        return news

    def close(self) -> None:
        """Lets the others go."""
        self._publish(None)

    def _publish(self, asked: list[tuple[str, Any]] | None) -> None:
        self._store.put(_key(self._turn), json.dumps(asked).encode())
        self._turn += 1


@contextlib.contextmanager
def leading(engine: Engine) -> Iterator[Engine | Leader]:
    """The engine, or what takes its place where other processes follow, until the block ends."""
    if jax.process_count() == 1:
        yield engine
        return
    with contextlib.closing(Leader(engine, Distributed())) as leader:
        yield leader


def follow(engine: Engine, store: Store) -> None:
    """Does what the first process's engine is asked, until that is closed."""
    for turn in itertools.count():
        asked = json.loads(store.get(_key(turn)))
        if asked is None:
            return
        for what, value in asked:
            if what == "submit":
                engine.submit(Request(**value))
            else:
                engine.cancel(value)
        engine.step()


class Distributed:
    """The store of the processes that `jax.distributed` connects."""

    def __init__(self):
        """Finds it."""
        self._client: Any = distributed.global_state.client

    def put(self, key: str, value: bytes) -> None:
        """In the coordinator's memory."""
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str) -> bytes:
        """Waits as long as it takes."""
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, int(1000 * _PATIENCE))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def remove(self, key: str) -> None:
        """Out of the coordinator's memory."""
        self._client.key_value_delete(key)


def _key(turn: int) -> str:
    return f"engine/{turn}"
