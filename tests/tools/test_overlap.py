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
        # Half as fast beside each other on a link; at full speed on two.
        ([Start(0, ("a",), 3), Start(1, ("a",), 3), Compute(5), Done(0), Done(1)], [2.5, 2.5]),
        ([Start(0, ("a",), 3), Start(1, ("b",), 3), Compute(5), Done(0), Done(1)], [3, 3]),
        ([Start(0, ("a", "b"), 3), Start(1, ("b",), 1), Compute(3), Done(0), Done(1)], [2, 1]),
        # A small one that is waited for lets the large one go on.
        ([Start(0, ("a",), 3), Start(1, ("a",), 1), Done(1), Compute(9), Done(0)], [2, 0]),
        ([Start(0, ("a",), 3), Start(1, ("b",), 1), Done(1), Compute(9), Done(0)], [2, 0]),
        # A loop that exchanges on its own.
        ([Start(0, ("a",), 3), Start(1, ("b",), 3), Compute(5, frozenset("a")), Done(0), Done(1)], [0, 3]),
    ],
)
def test_compute_counts_once_for_each_link(events, wanted):
    assert list(hidden(events).values()) == pytest.approx(wanted)


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


TICK = 1 / 240  # of a second


def tick_by_tick(events):
    """The same with a clock: in each tick every transfer has its share of the links."""
    left, axes, passed = {}, {}, {}

    def tick(taken, counted):
        runs = [n for n in left if left[n] > 0 and not taken & axes[n]]
        shares = {n: max(sum(axis in axes[other] for other in runs) for axis in axes[n]) for n in runs}
        for n in runs:
            moved = min(left[n], TICK / shares[n])
            left[n] -= moved
            passed[n] += moved * counted

    for event in events:
        if isinstance(event, Start):
            left[event.number], axes[event.number] = event.seconds, set(event.axes)
            passed[event.number] = 0
        elif isinstance(event, Done):
            while left[event.number] > 0:
                tick(set(), 0)
            del left[event.number]
        else:
            for _ in range(round(event.seconds / TICK)):
                tick(event.axes, 1)
    return passed


@settings(deadline=None, max_examples=50)
@given(programs())
def test_links_are_shared_at_every_moment(events):
    passed = hidden(events)
    assert passed == pytest.approx(tick_by_tick(events), abs=30 * TICK)
    lasts = {event.number: event for event in events if isinstance(event, Start)}
    assert all(0 <= passed[n] <= lasts[n].seconds + 1e-9 for n in lasts)
    for axis in "abc":
        free = sum(e.seconds for e in events if isinstance(e, Compute) and axis not in e.axes)
        assert sum(passed[n] for n in lasts if axis in lasts[n].axes) <= free + 1e-9
