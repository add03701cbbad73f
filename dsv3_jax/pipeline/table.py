"""A schedule as a table of integers: what each rank runs in every slot, and where it reads and writes.

In a slot each rank does one action, then neighbours exchange what they made. What has arrived and is not yet
used lies in a rank's mail; what a backward reads of its forward, and what a gradient of weights reads of its
backward, lie in two more pools. Places in all three are given here, so that none is larger than need be.
"""

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.pipeline.schedule import Part, Schedule, Work, spans

Slots = Int[np.ndarray, "slots ranks"]
NONE = -1
SENDERS = (-1, 0, 1)  # in ranks: the one before, this one, the one after


class Row(NamedTuple):
    """One kind of work: its stage, chunk and micro-batch, and its places in the pools; `NONE` where none."""

    stage: Slots
    chunk: Slots
    microbatch: Slots
    mail: Slots  # a stage's input, or its output's gradient; the first stage's forward has none
    kept: Slots  # written by a forward, read by its backward
    waiting: Slots  # written by a backward for inputs, read by that for weights


class Table(NamedTuple):
    """What is worked on, and where in the mail results are put at the end of a slot, by their sender.

    The last stage sends its output to itself: its backward starts from there.
    """

    forward: Row
    backward: Row  # whole where nothing is left waiting
    weight: Row
    outputs: tuple[Slots, ...]  # of forwards, one for each of `SENDERS`
    gradients: tuple[Slots, ...]  # of inputs


class Pools(NamedTuple):
    """How many places each pool of a rank has."""

    mail: int
    kept: int
    waiting: int


class _Done(NamedTuple):
    slot: int
    rank: int
    work: Work


def table(schedule: Schedule) -> tuple[Table, Pools]:
    """The table of a schedule that `check` has found right, and the sizes of its pools."""
    timeline = spans(schedule, lambda action: 1)
    shape = int(max(rank[-1].end for rank in timeline)), schedule.ranks
    rows = {part: Row(*(np.full(shape, NONE, np.int32) for _ in Row._fields)) for part in _ROW.values()}
    done: dict[tuple[Part, int, int], _Done] = {}
    for rank, program in enumerate(schedule.programs):
        for action, span in zip(program, timeline[rank], strict=True):
            for work in action:
                part, slot, stage = _ROW[work.part], int(span.start), schedule.stage(rank, work)
                done[part, stage, work.microbatch] = _Done(slot, rank, work)
                for field, value in zip(Row._fields, (stage, work.chunk, work.microbatch), strict=False):
                    getattr(rows[part], field)[slot, rank] = value

    outputs, gradients = ([np.full(shape, NONE, np.int32) for _ in SENDERS] for _ in range(2))
    mail, kept, waiting = (_Pool(schedule.ranks) for _ in Pools._fields)
    for (part, stage, microbatch), made in sorted(done.items(), key=lambda item: item[1].slot):
        match part:
            case Part.FORWARD:
                backward = done[Part.BACKWARD, stage, microbatch]
                last = stage == schedule.stages - 1
                reader = backward if last else done[Part.FORWARD, stage + 1, microbatch]
                _keep(kept, rows, "kept", made, backward)
                _send(mail, rows, outputs, made, reader)
            case Part.BACKWARD:
                if stage > 0:
                    _send(mail, rows, gradients, made, done[Part.BACKWARD, stage - 1, microbatch])
                if made.work.part is Part.BACKWARD_INPUT:
                    _keep(waiting, rows, "waiting", made, done[Part.BACKWARD_WEIGHT, stage, microbatch])
    forward, backward, weight = rows.values()
    whole = Table(forward, backward, weight, tuple(outputs), tuple(gradients))
    return whole, Pools(mail.size, kept.size, waiting.size)


_ROW = {  # which row a part of a stage stands in
    Part.FORWARD: Part.FORWARD,
    Part.BACKWARD: Part.BACKWARD,
    Part.BACKWARD_INPUT: Part.BACKWARD,
    Part.BACKWARD_WEIGHT: Part.BACKWARD_WEIGHT,
}


class _Pool:
    """Places of one rank's pool, the lowest that is free given out first; as large as the fullest rank's."""

    def __init__(self, ranks: int):
        self.size = 0
        self._busy: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]  # (last slot, place)
        self._free: list[list[int]] = [[] for _ in range(ranks)]
        self._used = [0] * ranks

    def take(self, rank: int, first: int, last: int) -> int:
        """A place that is free from slot `first` to `last`, ends included; `first` never falls."""
        busy, free = self._busy[rank], self._free[rank]
        while busy and busy[0][0] < first:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(self._used[rank])
            self._used[rank] += 1
            self.size = max(self.size, self._used[rank])
        place = heapq.heappop(free)
        heapq.heappush(busy, (last, place))
        return place


def _keep(pool: _Pool, rows: dict, field: str, made: _Done, reader: _Done) -> None:
    """Gives a place for what one work on a rank leaves there for a later one."""
    place = pool.take(made.rank, made.slot, reader.slot)
    for one in (made, reader):
        getattr(rows[_ROW[one.work.part]], field)[one.slot, one.rank] = place


def _send(pool: _Pool, rows: dict, arrivals: list[Slots], made: _Done, reader: _Done) -> None:
    """Gives a place in the reader's mail, from the slot after the one it is sent in."""
    place = pool.take(reader.rank, made.slot + 1, reader.slot)
    arrivals[SENDERS.index(made.rank - reader.rank)][made.slot, reader.rank] = place
    rows[_ROW[reader.work.part]].mail[reader.slot, reader.rank] = place
