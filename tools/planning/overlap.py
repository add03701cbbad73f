"""How much of transfers that are on their way is hidden by compute that stands beside them."""

from collections.abc import Iterable
from typing import NamedTuple


class Start(NamedTuple):
    """A transfer begins that uses the links along some axes of the mesh."""

    number: int
    axes: tuple[str, ...]
    seconds: float  # that it takes alone


class Done(NamedTuple):
    """From here on the result of a transfer is needed."""

    number: int


class Compute(NamedTuple):
    """Work, and the axes whose links transfers inside it use, where it is a loop that has some."""

    seconds: float
    axes: frozenset[str] = frozenset()


def hidden(events: Iterable[Start | Done | Compute]) -> dict[int, float]:
    """Seconds of each transfer that pass during compute, between its start and its end.

    Transfers with an axis in common share its links equally, so that a second of compute hides at most one
    second of theirs; those without run beside each other at full speed. While a result is waited for, others
    go on, and nothing is hidden. A loop with transfers of its own leaves no links to those outside.
    """
    pending: dict[int, Start] = {}  # with the seconds that are left
    passed: dict[int, float] = {}
    for event in events:
        if isinstance(event, Start):
            pending[event.number], passed[event.number] = event, 0.0
        elif isinstance(event, Done):
            while event.number in pending:
                _go_on(pending, float("inf"), frozenset(), event.number)
        else:
            left = event.seconds
            while left > 0 and (moved := _go_on(pending, left, event.axes)):
                left -= moved[0]
                for number, seconds in moved[1].items():
                    passed[number] += seconds
    return passed


def _go_on(
    pending: dict[int, Start], seconds: float, taken: frozenset[str], until: int | None = None
) -> tuple[float, dict[int, float]] | None:
    """Lets transfers run until one ends or the time is over; how long that was, and what each has done.

    None if none runs. `until`, which is waited for, is pending no more once there is nothing left of it.
    """
    if until is not None and pending[until].seconds <= 0:
        del pending[until]
        return None
    running = {n: t for n, t in pending.items() if t.seconds > 0 and taken.isdisjoint(t.axes)}
    if not running:
        return None
    users = [axis for transfer in running.values() for axis in transfer.axes]
    share = {n: max((users.count(axis) for axis in t.axes), default=1) for n, t in running.items()}
    lasts = min(seconds, *(t.seconds * share[n] for n, t in running.items()))
    done = {n: min(t.seconds, lasts / share[n]) for n, t in running.items()}
    for n, transfer in running.items():
        left = transfer.seconds - done[n]
        pending[n] = transfer._replace(seconds=left if left > 1e-12 * transfer.seconds else 0.0)
    return lasts, done
