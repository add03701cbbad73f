"""Two computations whose exchanges take turns, so that each can stand beside work of the other.

Left alone, a compiler may run all exchanges of one, then all of the other. Here an exchange of one begins
only after the last one of the other has ended (but for the first of several that leave together, which may
begin while they are made, `stops.py`), and what needs the other's result waits until both are there:
the work in between is independent of the exchange that is on its way. Where both halves of an exchange can be
called, as those of a kernel can, barriers hold all of that work between them. Elsewhere the compiler chooses
how much of it to put there, which `tools.plan` reads from the program. The order is that of DeepSeek's trace:
gradients out to the experts, tokens out, gradients home, tokens home
(https://github.com/deepseek-ai/profile-data; arXiv:2412.19437, figure 4).
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax

from dsv3_jax.pipeline.stops import Steps, Stop, finish


def begin(*operands: jax.Array) -> Generator[Stop, tuple, list[jax.Array]]:
    """The first stop of a computation that takes turns: what it returns is there when its work may begin."""
    arrays, _ = yield Stop(lambda *arrays: list(arrays), list(operands))
    return arrays


def turns(forward: int, backward: int) -> list[int]:
    """Which goes on at each turn, 0 for forward and 1 for backward, given how many exchanges each has.

    Tokens that a backward sends out again leave together with its gradients. Where it has still more to send,
    and must wait for each, all but the last come first.
    """
    first = min(forward, 1)
    last = min(backward, 1)
    return [1] * (backward - last) + [0] * first + [1] * last + [0] * (forward - first)


def in_turns(order: Sequence[int], first: Steps, second: Steps) -> tuple[Any, Any]:
    """What two computations return, each of which stops once before it begins.

    Args:
        order: whose next exchange comes next, once for each exchange.
        first: 0 in the order.
        second: 1 in the order.
    """
    if not order:
        return finish(first), finish(second)
    computations = first, second
    waiting: list[Any] = [next(steps) for steps in computations]  # a stop, or in the end what is returned
    arrived = [stop.operands for stop in waiting]

    def go_on(who: int) -> None:
        try:
            waiting[who] = computations[who].send((arrived[who], waiting[who].made))
        except StopIteration as end:
            waiting[who] = end.value

    def beside(begun: Any, other: int, hold: Callable) -> Any:
        """Lets the other go on to its next stop, and holds what is begun until it is there."""
        go_on(other)
        if isinstance(waiting[other], Stop):
            begun, (operands, made) = hold(begun, (waiting[other].operands, waiting[other].made))
            waiting[other] = waiting[other]._replace(operands=operands, made=made)
        else:
            begun, waiting[other] = hold(begun, waiting[other])
        return begun

    go_on(order[0])
    for who, following in zip(order, (*order[1:], 1 - order[-1]), strict=True):
        run, operands, halves, _ = waiting[who]
        if who == following:
            arrived[who] = run(*operands)
            go_on(who)
        elif halves is None:
            arrived[who] = beside(run(*operands), following, _hold)
        else:
            begun, arrived[following] = halves.hold(halves.start(*operands), arrived[following])
            arrived[who] = halves.done(beside(begun, following, halves.hold), *operands)
    go_on(order[-1])
    return waiting[0], waiting[1]


def _hold(begun: Any, others: Any) -> tuple[Any, Any]:
    return jax.lax.optimization_barrier((begun, others))
