"""The schedules one can choose (arXiv:2412.19437, section 3.2.1 and table 2)."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dsv3_jax.pipeline.schedule import Action, Costs, Part, Place, Schedule, Work


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv:1811.06965)."""
    _at_least_one(ranks, microbatches)

    def program(rank: int) -> Iterable[Action]:
        work = _Numbered()
        yield from (work.forward(0) for _ in range(microbatches))
        yield from (work.backward(0) for _ in range(microbatches))

    return _upwards(ranks, microbatches, program)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """A backward as soon as it can be: a rank keeps as many micro-batches as there are stages from it on.

    From arXiv:2104.04473, without interleaved stages.
    """
    _at_least_one(ranks, microbatches)

    def program(rank: int) -> Iterable[Action]:
        work = _Numbered()
        ahead = min(ranks - 1 - rank, microbatches)
        yield from (work.forward(0) for _ in range(ahead))
        for _ in range(microbatches - ahead):
            yield work.forward(0)
            yield work.backward(0)
        yield from (work.backward(0) for _ in range(ahead))

    return _upwards(ranks, microbatches, program)


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """1F1B whose gradients of weights wait until a rank would idle (arXiv:2401.10241, ZB-H1).

    Rank r lets r of them wait, so that every rank keeps as many micro-batches as the first does.
    """
    _at_least_one(ranks, microbatches)

    def program(rank: int) -> Iterable[Action]:
        work = _Numbered()
        ahead = min(ranks - 1 - rank, microbatches)
        yield from (work.forward(0) for _ in range(ahead))
        for done in range(microbatches):
            if done < microbatches - ahead:
                yield work.forward(0)
            yield work.backward_input(0)
            if done >= rank:
                yield work.backward_weight()
        yield from (work.backward_weight() for _ in range(min(rank, microbatches)))

    return _upwards(ranks, microbatches, program)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Micro-batches from both ends, forwards overlapped with backwards (section 3.2.1, figure 5).

    Rank r has stage r for those that enter at rank 0, and stage R - 1 - r for the others.
    """
    _at_least_one(ranks, microbatches)
    if ranks % 2 or microbatches % 2 or microbatches < 2 * ranks:
        raise ValueError(
            f"dualpipe over {ranks} ranks with {microbatches} micro-batches has no two equal directions that "
            f"fill it: take an even number of ranks and an even number of micro-batches from {2 * ranks} on."
        )
    half, share = ranks // 2, microbatches // 2

    def program(rank: int) -> Iterable[Action]:
        nearer = 0 if rank < half else 1  # the direction that enters at this rank's end
        work = _Numbered({0: 0, 1: share})
        return _eight_steps(work, (nearer, 1 - nearer), half, min(rank, ranks - 1 - rank), share)

    paths = (
        tuple(Place(rank, 0) for rank in range(ranks)),
        tuple(Place(rank, 1) for rank in reversed(range(ranks))),
    )
    return Schedule(microbatches, paths, tuple(tuple(program(rank)) for rank in range(ranks)))


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """DualPipe cut in half: one direction down the ranks and back, one copy of each of 2R stages.

    From https://github.com/deepseek-ai/DualPipe; rank r has stages r and 2R - 1 - r.
    """
    _at_least_one(ranks, microbatches)
    if microbatches < 2 * ranks:
        raise ValueError(
            f"dualpipev over {ranks} ranks cannot be filled by {microbatches} micro-batches: "
            f"take {2 * ranks} or more."
        )
    path = (
        *(Place(rank, 0) for rank in range(ranks)),
        *(Place(rank, 1) for rank in reversed(range(ranks))),
    )
    programs = (_eight_steps(_Numbered(), (0, 1), ranks, rank, microbatches) for rank in range(ranks))
    return Schedule(microbatches, (path,), tuple(tuple(program) for program in programs))


def _eight_steps(
    work: "_Numbered", chunks: tuple[int, int], half: int, j: int, share: int
) -> Iterable[Action]:
    """The rank that is j-th of `half` from its end, with `share` micro-batches for each of its chunks."""
    near, far = chunks
    after = half - 1 - j
    for _ in range(2 * after):  # 1
        yield work.forward(near)
    for _ in range(j + 1):  # 2
        yield work.forward(near)
        yield work.forward(far)
    for _ in range(after):  # 3
        yield work.backward_input(far)
        yield work.backward_weight()
        yield work.forward(far)
    for i in range(share - 2 * half + j + 1):  # 4
        pair = work.forward(near), work.backward(far)
        # On the innermost ranks one after the other, as in DeepSeek's code: there the first forward need not
        # wait for the backward that it would be paired with, and the bubble is smaller.
        yield from pair if i == 0 and after == 0 else [pair[0] + pair[1]]
        yield work.forward(far) + work.backward(near)
    for _ in range(after):  # 5
        yield work.backward(far)
        yield work.forward(far) + work.backward(near)
    for i in range(2 * (j + 1)):  # 6
        backward = work.backward if i < j + 1 else work.backward_input
        yield backward(near if i % 2 else far)
    for _ in range(after):  # 7
        yield work.backward_weight()
        yield work.backward_input(near)
    for _ in range(j + 1):  # 8
        yield work.backward_weight()


class _Numbered:
    """Work of one rank, numbered as it is asked for: micro-batches of a chunk come in order."""

    def __init__(self, first: dict[int, int] | None = None):
        """`first` is the first micro-batch of each chunk, 0 unless given."""
        self._next = {part: defaultdict(int, first or {}) for part in Part}
        self._waiting = deque[Work]()

    def _number(self, part: Part, chunk: int) -> Action:
        numbers = self._next[part]
        numbers[chunk] += 1
        return (Work(part, chunk, numbers[chunk] - 1),)

    def forward(self, chunk: int) -> Action:
        return self._number(Part.FORWARD, chunk)

    def backward(self, chunk: int) -> Action:
        (done,) = self._number(Part.BACKWARD_INPUT, chunk)
        return (done._replace(part=Part.BACKWARD),)

    def backward_input(self, chunk: int) -> Action:
        action = self._number(Part.BACKWARD_INPUT, chunk)
        self._waiting.extend(action)
        return action

    def backward_weight(self) -> Action:
        """Of the work that has waited longest."""
        return (self._waiting.popleft()._replace(part=Part.BACKWARD_WEIGHT),)


def _upwards(ranks: int, microbatches: int, program: Callable[[int], Iterable[Action]]) -> Schedule:
    """One stage a rank, in order."""
    path = tuple(Place(rank, 0) for rank in range(ranks))
    return Schedule(microbatches, (path,), tuple(tuple(program(rank)) for rank in range(ranks)))


def _at_least_one(ranks: int, microbatches: int) -> None:
    if ranks < 1 or microbatches < 1:
        raise ValueError(
            f"A pipeline of {ranks} ranks and {microbatches} micro-batches does nothing: take 1 or more."
        )


class Entry(NamedTuple):
    """A schedule, from ranks and micro-batches, and the time that a rank idles by the report's table 2."""

    make: Callable[[int, int], Schedule]
    bubble: Callable[[int, Costs], float]


def _backward(costs: Costs) -> float:
    return costs.backward_input + costs.backward_weight


def _filled_once(ranks: int, costs: Costs) -> float:
    return (ranks - 1) * (costs.forward + _backward(costs))


def _zero_bubble(ranks: int, costs: Costs) -> float:
    return (ranks - 1) * (costs.forward + _backward(costs) - 2 * costs.backward_weight)


def _from_both_ends(half: int, costs: Costs) -> float:
    return (half - 1) * (costs.overlapped + _backward(costs) - 3 * costs.backward_weight)


SCHEDULES = {
    "gpipe": Entry(gpipe, _filled_once),
    "1f1b": Entry(one_f_one_b, _filled_once),
    "zb1p": Entry(zb1p, _zero_bubble),
    "dualpipe": Entry(dualpipe, lambda ranks, costs: _from_both_ends(ranks // 2, costs)),
    "dualpipev": Entry(dualpipev, _from_both_ends),
}
