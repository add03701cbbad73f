"""Pipeline schedules as data: what each rank runs, in which order, and what that costs.

A schedule is a list of actions for each rank and the ways of micro-batches through the ranks. Nothing here
knows of arrays or devices; `catalogue` makes schedules.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple


class Part(StrEnum):
    """What is computed of a stage. A backward pass runs whole, or for inputs first and for weights later."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"


class Work(NamedTuple):
    """One part of one stage for one micro-batch."""

    part: Part
    chunk: int  # which of the rank's stages
    microbatch: int


Action = tuple[Work, ...]
"""What a rank does at a time: one work, or a forward and a backward that hide each other's communication."""


class Place(NamedTuple):
    """Where a stage lives; a rank with two chunks has two stages."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Schedule:
    """Actions by rank. Micro-batches go along `paths` in equal shares, those of the first path first."""

    microbatches: int
    paths: tuple[tuple[Place, ...], ...]  # by direction, then by stage
    programs: tuple[tuple[Action, ...], ...]  # by rank

    @property
    def ranks(self) -> int:
        """Devices along the pipeline axis."""
        return len(self.programs)

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into."""
        return len(self.paths[0])

    def direction(self, microbatch: int) -> int:
        """Which of the paths a micro-batch takes."""
        return microbatch * len(self.paths) // self.microbatches

    def stage(self, rank: int, work: Work) -> int:
        """Which stage a rank's work is of; ValueError where its micro-batch does not come by."""
        if not 0 <= work.microbatch < self.microbatches:
            raise ValueError(
                f"Rank {rank} works on micro-batch {work.microbatch} of {self.microbatches}: count from 0."
            )
        path = self.paths[self.direction(work.microbatch)]
        if Place(rank, work.chunk) not in path:
            raise ValueError(
                f"Micro-batch {work.microbatch} does not come by chunk {work.chunk} of rank {rank}: "
                "take it up where its path leads."
            )
        return path.index(Place(rank, work.chunk))


class Costs(NamedTuple):
    """What parts of a stage take, in any unit of time; a whole backward takes as long as its two halves."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    overlapped: float = 3.0  # a forward and a whole backward together

    def of(self, action: Action) -> float:
        """How long an action takes."""
        first, *others = action
        if others:
            return self.overlapped
        match first.part:
            case Part.FORWARD:
                return self.forward
            case Part.BACKWARD:
                return self.backward_input + self.backward_weight
            case Part.BACKWARD_INPUT:
                return self.backward_input
            case Part.BACKWARD_WEIGHT:
                return self.backward_weight


class Span(NamedTuple):
    """When an action runs."""

    start: float
    end: float


def spans(schedule: Schedule, duration: Callable[[Action], float]) -> list[list[Span]]:
    """When each rank's actions run, if each starts as soon as its rank and what it needs are there.

    With a duration of 1 they are slots of a table in which everything sent arrives before the next slot.

    Raises:
        ValueError: where ranks wait for each other, or for what nobody does.
    """
    done: dict[_Event, float] = {}
    timeline: list[list[Span]] = [[] for _ in schedule.programs]
    waiting = set(range(schedule.ranks))
    while waiting:
        before = sum(map(len, timeline))
        for rank, program in enumerate(schedule.programs):
            for action in program[len(timeline[rank]) :]:
                needed = [event for work in action for event in _needs(schedule, rank, work)]
                if not all(event in done for event in needed):
                    break
                free = timeline[rank][-1].end if timeline[rank] else 0
                start = max([free, *(done[event] for event in needed)])
                timeline[rank].append(Span(start, start + duration(action)))
                done |= {_made(schedule, rank, work): timeline[rank][-1].end for work in action}
        waiting = {rank for rank in waiting if len(timeline[rank]) < len(schedule.programs[rank])}
        if waiting and sum(map(len, timeline)) == before:
            rank = min(waiting)
            stuck = schedule.programs[rank][len(timeline[rank])]
            raise ValueError(
                f"Rank {rank} would wait for ever before {_words(stuck)}: put what it needs before it, "
                "on a rank that does not wait for it."
            )
    return timeline


def idle(schedule: Schedule, costs: Costs) -> list[float]:
    """The time that each rank does nothing between the first rank's start and the last one's end."""
    timeline = spans(schedule, costs.of)
    whole = max(rank[-1].end for rank in timeline)
    return [whole - sum(span.end - span.start for span in rank) for rank in timeline]


def limited(schedule: Schedule, waiting: int) -> Schedule:
    """The same, but a rank lets the gradients of weights of at most so many micro-batches wait.

    Those of others are made with the gradients of their inputs. For memory: what waits is large, and a long
    pipeline idles little without it.
    """

    def program(actions: tuple[Action, ...]) -> Iterator[Action]:
        held: set[Work] = set()
        for first, *others in actions:
            whole = first._replace(part=Part.BACKWARD)
            match first.part:
                case Part.BACKWARD_INPUT if len(held) < waiting:
                    held.add(whole)
                case Part.BACKWARD_INPUT:
                    first = whole
                case Part.BACKWARD_WEIGHT if whole in held:
                    held.remove(whole)
                case Part.BACKWARD_WEIGHT:
                    continue
            yield first, *others

    return replace(schedule, programs=tuple(tuple(program(actions)) for actions in schedule.programs))


def peak_in_flight(schedule: Schedule) -> list[int]:
    """By rank, the most forwards whose backward, weights included, is not through."""
    peaks = []
    for program in schedule.programs:
        now = peak = 0
        for action in program:
            now += sum(work.part is Part.FORWARD for work in action)
            peak = max(peak, now)
            now -= sum(work.part in (Part.BACKWARD, Part.BACKWARD_WEIGHT) for work in action)
        peaks.append(peak)
    return peaks


def check(schedule: Schedule) -> None:
    """Proves a schedule right, or raises ValueError with the first thing that is wrong.

    Every micro-batch goes forward and backward once through every stage, at that stage's place; a path leads
    from neighbour to neighbour; nothing waits for ever; and what a rank sends to a neighbour is received in
    the order in which it was sent.
    """
    for path in schedule.paths:
        for here, there in pairwise(path):
            if abs(here.rank - there.rank) > 1:
                raise ValueError(
                    f"A path leads from rank {here.rank} to {there.rank}: stages must be neighbours."
                )
    _each_once(schedule)
    timeline = spans(schedule, lambda action: 1)
    for channel, sent, received in _messages(schedule, timeline):
        if sent != received:
            raise ValueError(
                f"{channel} carries micro-batches {sent} but {received} are received: sort them alike."
            )


def _each_once(schedule: Schedule) -> None:
    counts = Counter(
        (work.microbatch, schedule.stage(rank, work), part)
        for rank, program in enumerate(schedule.programs)
        for action in program
        for work in action
        for part in _halves(work.part)
    )
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            for part in (Part.FORWARD, Part.BACKWARD_INPUT, Part.BACKWARD_WEIGHT):
                times = counts[microbatch, stage, part]
                if times != 1:
                    raise ValueError(
                        f"The {part} of micro-batch {microbatch} at stage {stage} runs {times} times: "
                        "it must run once."
                    )


def _halves(part: Part) -> tuple[Part, ...]:
    return (Part.BACKWARD_INPUT, Part.BACKWARD_WEIGHT) if part is Part.BACKWARD else (part,)


class _Event(NamedTuple):
    """A stage's output, or the gradient of its input, has been made."""

    part: Part
    stage: int
    microbatch: int


def _made(schedule: Schedule, rank: int, work: Work) -> _Event:
    part = Part.BACKWARD_INPUT if work.part is Part.BACKWARD else work.part
    return _Event(part, schedule.stage(rank, work), work.microbatch)


def _needs(schedule: Schedule, rank: int, work: Work) -> Iterator[_Event]:
    stage = schedule.stage(rank, work)
    if work.part is Part.FORWARD:
        if stage > 0:
            yield _Event(Part.FORWARD, stage - 1, work.microbatch)
    elif work.part is Part.BACKWARD_WEIGHT:
        yield _Event(Part.BACKWARD_INPUT, stage, work.microbatch)
    else:
        yield _Event(Part.FORWARD, stage, work.microbatch)
        if stage < schedule.stages - 1:
            yield _Event(Part.BACKWARD_INPUT, stage + 1, work.microbatch)


def _messages(schedule: Schedule, timeline: list[list[Span]]) -> Iterator[tuple[str, list[int], list[int]]]:
    """For every stage that sends: which channel, the micro-batches as sent, and as received."""
    order = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action, span in zip(program, timeline[rank], strict=True):
            for work in action:
                made = _made(schedule, rank, work)
                direction = schedule.direction(work.microbatch)
                order[direction, made.part, made.stage].append((span.start, work.microbatch))
    for direction in range(len(schedule.paths)):
        for stage in range(schedule.stages - 1):
            for part, sender, receiver in (
                (Part.FORWARD, stage, stage + 1),
                (Part.BACKWARD_INPUT, stage + 1, stage),
            ):
                sent, received = (
                    [microbatch for _, microbatch in sorted(order[direction, part, end])]
                    for end in (sender, receiver)
                )
                yield f"The {part} channel from stage {sender} to {receiver}", sent, received


def _words(action: Action) -> str:
    return " and ".join(f"the {work.part} of micro-batch {work.microbatch}" for work in action)
