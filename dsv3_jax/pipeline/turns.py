"""Two computations whose exchanges take turns, so that each can stand beside work of the other.

Left alone, a compiler may run all exchanges of one, then all of the other. Here an exchange of one begins
only after the last one of the other has ended, and what needs the other's result waits until both are there:
the work in between is independent of the exchange that is on its way. How much of it the compiler then puts
beside the exchange is its choice, which `tools.plan` reads from the program. The order is that of DeepSeek's
trace: gradients out to the experts, tokens out, gradients home, tokens home
(https://github.com/deepseek-ai/profile-data; arXiv:2412.19437, figure 4).
"""

from collections.abc import Sequence
from typing import Any

import jax

from dsv3_jax.pipeline.cut import Steps


def turns(forward: int, backward: int) -> list[int]:
    """Which goes on at each turn, 0 for forward and 1 for backward, given how many exchanges each has.

    Where a backward sends tokens out again, it does so before its gradients.
    """
    first = min(forward, 1)
    last = min(backward, 1)
    return [1] * (backward - last) + [0] * first + [1] * last + [0] * (forward - first)


def in_turns(order: Sequence[int], *computations: Steps) -> list[Any]:
    """What the computations return; `order` says whose next exchange comes next, once for each exchange."""
    pending: list[Any] = [None for _ in computations]
    returned: list[Any] = [None for _ in computations]

    def go_on(who: int, arrived: Any) -> None:
        try:
            pending[who] = computations[who].send(arrived)
        except StopIteration as end:
            returned[who] = end.value

    for who in range(len(computations)):
        go_on(who, None)
    for who, following in zip(order, (*order[1:], None), strict=True):
        exchange, operands = pending[who]
        arrived = exchange(*operands)
        if following not in (who, None):
            exchange, operands = pending[following]
            operands, arrived = jax.lax.optimization_barrier((operands, arrived))
            pending[following] = exchange, operands
        go_on(who, arrived)
    return returned
