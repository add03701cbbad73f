"""What instructions take, and sums of that."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tools.planning.groups import Span
from tools.planning.hlo import Instruction

LISTED = 20  # instructions that are named for people


class Cost(NamedTuple):
    """What instructions take; of a conditional the branch that takes longest, and in `least` the shortest."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    least: float = 0.0  # seconds

    def times(self, turns: float) -> "Cost":
        """That of several turns."""
        return Cost(*(turns * part for part in self))


class Transfer(NamedTuple):
    """A collective as it stands in a computation; a synchronous one hides nothing."""

    kind: str
    span: Span
    bytes: float  # that a device sends
    seconds: float
    hidden: float  # seconds
    asynchronous: int  # 0 or 1
    instruction: Instruction


@dataclass(frozen=True)
class Collectives:
    """All collectives of a kind in a step: sums over a device's turns of all loops."""

    count: float
    asynchronous: float
    bytes: float
    seconds: float
    hidden: float  # seconds

    @property
    def hidden_share(self) -> float:
        """By time."""
        return self.hidden / self.seconds

    @classmethod
    def of(cls, transfers: Iterable[tuple[float, Transfer]]) -> "Collectives":
        """The sum of transfers, each with how often it takes place."""
        rows = [[w, w * t.asynchronous, w * t.bytes, w * t.seconds, w * t.hidden] for w, t in transfers]
        return cls(*map(sum, zip(*rows, strict=True)))


class Costly(NamedTuple):
    """An instruction among those that take longest; of a collective, what nothing hides."""

    seconds: float  # in a step
    times: float
    opcode: str
    name: str
    op_name: str


def grouped(transfers: Sequence[tuple[float, Transfer]], key: Callable) -> dict:
    """Sums of transfers, each with how often it takes place, by what the key says of it."""
    some = [(w, t) for w, t in transfers if w * t.seconds > 0]
    return {k: Collectives.of(p for p in some if key(p[1]) == k) for k in sorted({key(t) for _, t in some})}


def longest(rows: Iterable[tuple[float, float, Instruction]]) -> list[Costly]:
    """The instructions with the most seconds, each with these and how often it runs."""
    longest = heapq.nlargest(LISTED, rows, key=lambda row: row[0])
    return [Costly(s, w, i.opcode, i.name, i.op_name) for s, w, i in longest if s > 0]


def added(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return Cost(*map(sum, zip(Cost(), *costs, strict=True)))
