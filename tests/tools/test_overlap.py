"""Compute hides transfers second by second, and each second on a link once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.planning.overlap import Compute, Done, Start, hidden


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([Start(0, ("a",), 3), Compute(2), Done(0)], [2]),
        ([Start(0, ("a",), 3), Compute(5), Done(0)], [3]),
        ([Start(0, ("a",), 3), Done(0), Compute(5)], [0]),
        ([Start(0, ("a",), 3), Compute(5)], [3]),  # its end is elsewhere
        # One after another on a link; beside each other on two.
        ([Start(0, ("a",), 3), Start(1, ("a",), 3), Compute(5), Done(0), Done(1)], [3, 2]),
        ([Start(0, ("a",), 3), Start(1, ("b",), 3), Compute(5), Done(0), Done(1)], [3, 3]),
        ([Start(0, ("a", "b"), 3), Start(1, ("b",), 3), Compute(5), Done(0), Done(1)], [3, 2]),
        # The last one waits for the second, and this for the first.
        (
            [Start(0, ("a",), 3), Start(1, ("a", "b"), 3), Start(2, ("b",), 3), Done(2), Compute(9), Done(0)],
            [0, 0, 0],
        ),
        # A loop that exchanges on its own.
        ([Start(0, ("a",), 3), Start(1, ("b",), 3), Compute(5, frozenset("a")), Done(0), Done(1)], [0, 3]),
        # Waiting for the second is waiting for the first too, and nothing hides that.
        ([Start(0, ("a",), 3), Start(1, ("a",), 3), Compute(1), Done(1), Compute(9), Done(0)], [1, 0]),
        ([Start(0, ("b",), 3), Start(1, ("a",), 3), Compute(1), Done(1), Compute(9), Done(0)], [3, 1]),
    ],
)
def test_compute_counts_once_for_each_link(events, wanted):
    assert list(hidden(events).values()) == wanted


@st.composite
def programs(draw):
    """Some transfers with whole seconds, in any order of starts, ends and compute."""
    total = draw(st.integers(1, 5))
    axes = st.sampled_from([("a",), ("b",), ("a", "b"), ("c",)])
    events, begun, ended = [], 0, set()
    for _ in range(draw(st.integers(1, 25))):
        what = draw(st.integers(0, 2))
        if what == 0 and begun < total:
            events.append(Start(begun, draw(axes), draw(st.integers(1, 6))))
            begun += 1
        elif what == 1 and len(ended) < begun:
            chosen = draw(st.sampled_from([n for n in range(begun) if n not in ended]))
            ended.add(chosen)
            events.append(Done(chosen))
        else:
            events.append(Compute(draw(st.integers(1, 4)), draw(st.frozensets(st.sampled_from("abc")))))
    return events


def without(queue, number):
    """What is left of [number, axes, seconds] when one has been waited for, and those that it waited for."""
    place = [transfer[0] for transfer in queue].index(number)
    waited, gone = queue[place][1], {number}
    for other, axes, _ in reversed(queue[:place]):
        if axes & waited:
            waited, gone = waited | axes, gone | {other}
    return [transfer for transfer in queue if transfer[0] not in gone]


def second_by_second(events):
    """The same with a clock: in each second a transfer runs if none before it needs one of its links."""
    queue, passed = [], {}
    for event in events:
        if isinstance(event, Start):
            queue.append([event.number, set(event.axes), event.seconds])
            passed[event.number] = 0
            continue
        ends, axes = ({event.number}, ()) if isinstance(event, Done) else (set(), event.axes)
        while ended := [number for number, used, _ in queue if number in ends or used.intersection(axes)]:
            queue = without(queue, ended[0])
        for _ in range(int(event.seconds) if isinstance(event, Compute) else 0):
            unfinished = [transfer for transfer in queue if transfer[2]]
            before = [set().union(*(used for _, used, _ in unfinished[:n])) for n in range(len(unfinished))]
            for transfer, used in zip(unfinished, before, strict=True):
                if not transfer[1] & used:
                    transfer[2] -= 1
                    passed[transfer[0]] += 1
    return passed


@settings(deadline=None)
@given(programs())
def test_links_are_shared_second_by_second(events):
    passed = hidden(events)
    assert passed == second_by_second(events)
    lasts = {event.number: event for event in events if isinstance(event, Start)}
    assert all(0 <= passed[n] <= lasts[n].seconds for n in lasts)
    for axis in "abc":
        free = sum(e.seconds for e in events if isinstance(e, Compute) and axis not in e.axes)
        assert sum(passed[n] for n in lasts if axis in lasts[n].axes) <= free
