"""Continuous batching: requests of any length share slots, come and go, and nothing is compiled anew.

Prompts are read in parts of a few widths, as many at once as fit, each into a slot of its own device;
between parts all sequences that are complete go on for some steps. What a sequence gets does not depend on
what stands beside it (`sampling`).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.config import Config
from dsv3_jax.inference.decode import SLOTS, Prompt, Running, decode, prefill
from dsv3_jax.inference.request import Counts, Limits, News, Request, check
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model import cached
from dsv3_jax.model.cached import Rows, Served
from dsv3_jax.ops import Ops


@dataclass
class _Slot:
    number: int
    request: Request
    read: int = 0  # tokens of the prompt
    given: int = 0


_SHORTEST = 16  # tokens of the narrowest part of a prompt


@dataclass
class Engine:
    """Serves requests with the weights of a model on the mesh that is set.

    Everything that changes is here; the programs it calls are pure. Where the mesh spans processes each has
    an engine: ask all for the same in the same order, and all give the same news.
    """

    model: Served
    c: Config
    ops: Ops
    limits: Limits = Limits()
    counts: Counts = Counts()
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _waiting: deque[tuple[int, Request]] = field(default_factory=deque)
    _slots: list[_Slot | None] = field(default_factory=list)

    def __post_init__(self):
        """Makes room."""
        mesh, limits = jax.sharding.get_mesh(), self.limits
        if limits.slots % mesh.size:
            raise ValueError(
                f"slots={limits.slots} do not divide over {mesh.size} devices: choose a multiple of these."
            )
        if limits.drafts > self.c.mtp_depth:
            raise ValueError(
                f"drafts={limits.drafts} but the model has no multi-token prediction: set drafts=0."
            )
        sizes = limits.slots, limits.length, limits.drafts, limits.ends
        self._running = jax.jit(partial(Running.init, self.c, self.ops, *sizes))()
        self._slots = [None] * limits.slots
        self._each = limits.slots // mesh.size  # slots of a device

    def submit(self, request: Request) -> int:
        """Puts a request at the end of the queue and gives its number.

        Raises:
            ValueError: if it can never be served.
        """
        check(request, self.limits, self.c.vocab)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request, wherever it is; one that is done is not there."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != number)
        for place, slot in enumerate(self._slots):
            if slot and slot.number == number:
                self._slots[place] = None  # it goes on until another takes its place, and nobody listens

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(slot is not None for slot in self._slots)

    def step(self) -> list[News]:
        """Reads parts of prompts and goes on with all others; nothing if there is nothing to do."""
        for place, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                self._slots[place] = _Slot(*self._waiting.popleft())
        news = []
        unread = [s for s in self._slots if s and s.read < len(s.request.prompt)]
        if unread:  # the oldest, and all that are read as it is
            starts = min(unread, key=lambda s: s.number).read == 0
            alike = [s for s in unread if (s.read == 0) == starts]
            news += self._read(alike, cached.first_tokens if starts else cached.further_tokens)
        if any(s and s.given for s in self._slots):
            news += self._write()
        return news

    def _read(self, slots: list[_Slot], attend) -> list[News]:
        """The next part of as many prompts as fit into a part, one at least on each device."""
        by_device: list[list[int]] = [[] for _ in range(self.limits.slots // self._each)]
        for place, slot in enumerate(self._slots):
            if slot in slots:
                by_device[place // self._each].append(place)
        rows = 1 << (max(map(len, by_device)) - 1).bit_length()
        longest = max(len(slot.request.prompt) - slot.read for slot in slots)
        width = max(_SHORTEST, 1 << (longest - 1).bit_length())
        width = min(width, self.limits.part)
        rows = min(rows, max(1, self.limits.part // width))
        prompt = _empty_prompt(rows * len(by_device), width, self._each, self.limits.ends)
        chosen: list[tuple[int, int]] = []  # rows and slots
        for device, places in enumerate(by_device):
            chosen += [(device * rows + n, place) for n, place in enumerate(places[:rows])]
        for row, place in chosen:
            self._fill(prompt, row, place, width)
        self._running, sampled = prefill(
            self.model,
            self._running,
            _placed(prompt),
            c=self.c,
            ops=self.ops,
            attend=attend,
        )
        tokens, logprobs, counts = map(np.asarray, sampled)
        news = [self._got(place, tokens[row], logprobs[row], counts[row]) for row, place in chosen]
        return [one for one in news if one.tokens]

    def _fill(self, prompt: Prompt, row: int, place: int, width: int) -> None:
        slot = self._slots[place]
        assert slot
        r, part = slot.request, slot.request.prompt[slot.read : slot.read + width]
        known = r.prompt[slot.read : slot.read + width + 1]
        prompt.tokens[row, : len(known)] = known
        prompt.rows.slots[row], prompt.rows.starts[row] = place % self._each, slot.read
        prompt.rows.counts[row], prompt.left[row] = len(part), r.most
        prompt.ends[row, : len(r.ends)] = r.ends
        values = r.temperature, r.top_k, r.top_p, r.seed & 0xFFFFFFFF
        for array, value in zip(jax.tree.leaves(prompt.sampling), values, strict=True):
            array[row] = value
        slot.read += len(part)
        self.counts = self.counts._replace(prompt_tokens=self.counts.prompt_tokens + len(part))

    def _write(self) -> list[News]:
        self._running, sampled = decode(
            self.model, self._running, c=self.c, ops=self.ops, steps=self.limits.steps
        )
        tokens, logprobs, counts = map(np.asarray, sampled)
        news = []
        for place, slot in enumerate(self._slots):
            if slot is None or not slot.given:
                continue
            taken = counts[:, place]
            real = np.arange(tokens.shape[2])[None] < taken[:, None]
            steps, drafts = int(np.sum(taken > 0)), self.limits.drafts
            total = self.counts
            self.counts = total._replace(
                steps=total.steps + steps,
                drafts=total.drafts + steps * drafts,
                accepted=total.accepted + int(taken.sum()) - steps,
            )
            news.append(self._got(place, tokens[:, place][real], logprobs[:, place][real], taken.sum()))
        return news

    def _got(self, place: int, tokens: np.ndarray, logprobs: np.ndarray, count: int) -> News:
        slot = self._slots[place]
        assert slot
        given = tokens[:count].tolist()
        slot.given += len(given)
        self.counts = self.counts._replace(tokens=self.counts.tokens + len(given))
        finished = slot.given >= slot.request.most or bool(given and given[-1] in slot.request.ends)
        if finished:
            self._slots[place] = None
        return News(slot.number, given, logprobs[:count].tolist(), finished)


def generated(
    engine: Engine,
    requests: list[Request],
    listen: Callable[[int, News], bool] = lambda *_: True,
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of requests, in their order.

    Args:
        listen: is told which request, by its place, has news; says whether to go on with it.
    """
    numbers = {engine.submit(request): n for n, request in enumerate(requests)}
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in requests]
    while engine.active or engine.waiting:
        for news in engine.step():
            n = numbers[news.number]
            results[n][0].extend(news.tokens)
            results[n][1].extend(news.logprobs)
            if not listen(n, news):
                engine.cancel(news.number)
    return results


def _empty_prompt(rows: int, width: int, nowhere: int, ends: int) -> Prompt:
    """Rows of no sequence."""

    def full(value: int, dtype: type, *shape: int) -> Any:
        return np.full((rows, *shape), value, dtype)

    types = np.float32, np.int32, np.float32, np.uint32
    return Prompt(
        Rows(full(nowhere, np.int32), full(0, np.int32), full(0, np.int32)),
        full(-1, np.int32, width + 1),
        full(0, np.int32),
        Sampling(*(full(0, dtype) for dtype in types)),
        full(-1, np.int32, ends),
    )


def _placed(prompt: Prompt) -> Prompt:
    layout = NamedSharding(jax.sharding.get_mesh(), SLOTS)
    return jax.tree.map(
        lambda rows: jax.make_array_from_callback(rows.shape, layout, lambda index: rows[index]), prompt
    )
