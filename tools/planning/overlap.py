"""How much of transfers that are on their way is hidden by compute that stands beside them."""

from collections.abc import Iterable
from typing import NamedTuple


class Start(NamedTuple):
    """A transfer begins that keeps the links along some axes of the mesh busy."""

    number: int
    axes: tuple[str, ...]
    seconds: float


class Done(NamedTuple):
    """From here on the result of a transfer is needed."""

    number: int


class Compute(NamedTuple):
    """Work, and the axes whose links transfers inside it use, where it is a loop that has some."""

    seconds: float
    axes: frozenset[str] = frozenset()


def hidden(events: Iterable[Start | Done | Compute]) -> dict[int, float]:
    """Seconds of each transfer that pass during compute, between its start and its end.

    Transfers with an axis in common run one after another, in the order in which they start, so that a second
    of compute hides at most one second of theirs; those without run beside each other. Waiting for a
    transfer hides nothing: not of it, nor of those before it on its links, nor of any other. A loop with
    transfers of its own waits for those that use their links before it computes.
    """
    pending: dict[int, Start] = {}  # with the seconds that are left
    passed: dict[int, float] = {}
    for event in events:
        if isinstance(event, Start):
            pending[event.number], passed[event.number] = event, 0.0
        elif isinstance(event, Done):
            _wait(pending, event.number)
        else:
            for number in [n for n, transfer in pending.items() if event.axes.intersection(transfer.axes)]:
                _wait(pending, number)
            _work(pending, passed, event.seconds)
    return passed


def _wait(pending: dict[int, Start], number: int) -> None:
    """Ends a transfer, and those before it that it waits for."""
    if number not in pending:
        return
    order = list(pending)
    busy = set(pending.pop(number).axes)
    for earlier in reversed(order[: order.index(number)]):
        if busy.intersection(pending[earlier].axes):
            busy |= set(pending.pop(earlier).axes)


def _work(pending: dict[int, Start], passed: dict[int, float], seconds: float) -> None:
    """Lets transfers run for a while."""
    while seconds > 0:
        running, busy = [], set()
        for transfer in pending.values():
            if transfer.seconds > 0:
                running += [transfer] if busy.isdisjoint(transfer.axes) else []
                busy |= set(transfer.axes)
        if not running:
            return
        step = min(seconds, *(transfer.seconds for transfer in running))
        for transfer in running:
            pending[transfer.number] = transfer._replace(seconds=transfer.seconds - step)
            passed[transfer.number] += step
        seconds -= step
