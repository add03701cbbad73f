"""Where a program stops for exchanges of tokens, and what it computes between.

Exchanges that do not wait for each other are one stop. Where both halves of an exchange can be called, those
of a stop begin one after another, each as soon as what it sends is there: what the next one sends is computed
beside it.
"""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from dsv3_jax.ops.exchange import NAME, Apart, apart

CALLS = ("jit", "pjit", "closed_call")
_EXCHANGES = ("all_to_all", "ragged_all_to_all")


class Stop(NamedTuple):
    """Where a computation waits for collectives."""

    run: Callable[..., list[jax.Array]]
    operands: list[jax.Array]
    halves: Apart | None = None  # of `run`, where these can be called
    made: Sequence[jax.Array] = ()  # since the last stop, for later


Steps = Generator[Stop, tuple[list[jax.Array], Sequence[jax.Array]], Any]
"""A computation that stops before large exchanges, and goes on with their results and what it had made."""


class Part(NamedTuple):
    """Exchanges, or the equations between them."""

    run: Callable[..., list[jax.Array]]
    reads: list[core.Var]
    makes: list[core.Var]
    stops: bool  # whether what comes after needs it; else an exchange begins here, and ends at the next stop
    halves: Apart | None  # of exchanges


class _Begun(NamedTuple):
    """An exchange on its way."""

    makes: list[core.Var]
    done: Callable[[Any], list[jax.Array]]
    future: Any


def finish(steps: Steps) -> Any:
    """What a computation returns whose exchanges take place as they come."""
    gone_on: Any = None
    while True:
        try:
            stop = steps.send(gone_on)
        except StopIteration as end:
            return end.value
        gone_on = stop.run(*stop.operands), stop.made


def taken(parts: Sequence[Part], values: dict[core.Var, Any]) -> Generator[Stop, tuple, None]:
    """Takes parts one after another, and adds what they make to the values of variables."""
    made: list[core.Var] = []
    ahead: list[_Begun] = []
    for part, following in itertools.zip_longest(parts, parts[1:]):
        operands = [values[v] for v in part.reads]
        if part.stops:
            results, held = yield _stop(ahead, part, operands, [values[v] for v in made])
            values |= zip(made, held, strict=True)
            values |= zip([v for p in (*ahead, part) for v in p.makes], results, strict=True)
            made, ahead = [], []
        elif part.halves is not None:
            begun = part.halves.start(*operands)
            (future,), later = part.halves.hold(begun, [values[v] for v in following.reads])
            values |= zip(following.reads, later, strict=True)
            done = part.halves.done
            ahead.append(_Begun(part.makes, lambda f, d=done, o=operands: d([f], *o), future))
        else:
            values |= zip(part.makes, part.run(*operands), strict=True)
            made = [*made, *part.makes]


def _stop(ahead: list[_Begun], part: Part, operands: list, made: list) -> Stop:
    """For a part's exchanges and those that are on their way."""
    halves = part.halves
    if not ahead or halves is None:
        return Stop(part.run, operands, halves, made)

    def start(*given):
        return [*(one.future for one in ahead), *halves.start(*given)]

    def done(begun, *given):
        results = [y for one, future in zip(ahead, begun, strict=False) for y in one.done(future)]
        return [*results, *halves.done(begun[len(ahead) :], *given)]

    return Stop(lambda *given: done(start(*given), *given), operands, Apart(start, halves.hold, done), made)


def parts(whole: core.Jaxpr, equations: list[core.JaxprEqn], needed: list[core.Var]) -> list[Part]:
    """Equations by how many large exchanges come before them; each part makes what later ones ask for."""
    most = max(map(_moved, equations), default=0)
    before: dict[Any, int] = {}
    runs: dict[tuple[int, bool], list[core.JaxprEqn]] = {}
    for equation in equations:
        depth = max((before.get(v, 0) for v in filter(is_variable, equation.invars)), default=0)
        large = 2 * _moved(equation) > most
        runs.setdefault((depth, large), []).append(equation)
        before |= dict.fromkeys(equation.outvars, depth + large)
    found, later = [], set(needed)
    for run, exchanges, stops in reversed(_in_order(runs)):
        makes = [v for e in run for v in e.outvars if v in later]
        reads = not_made(run, [])
        jaxpr = whole.replace(constvars=[], invars=reads, outvars=makes, eqns=run)
        evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))
        found.append(Part(evaluate, reads, makes, stops, _halves(run, reads) if exchanges else None))
        later |= set(reads)
    return found[::-1]


def _in_order(runs: dict[tuple[int, bool], list]) -> list[tuple[list[core.JaxprEqn], bool, bool]]:
    """Equations of each part, whether they are exchanges, and whether the program stops for them."""
    order = []
    for depth in sorted({depth for depth, _ in runs}):
        work, exchanges = runs.get((depth, False), []), runs.get((depth, True), [])
        if len(exchanges) > 1 and _halves(exchanges, not_made(exchanges, [])):
            for exchange in exchanges[:-1]:
                own = _made_of(work, exchange)
                order += [(own, False, False), ([exchange], True, False)]
                work = [e for e in work if not any(e is one for one in own)]
            exchanges = exchanges[-1:]
        order += [(work, False, False), (exchanges, True, True)]
    return [entry for entry in order if entry[0]]


def _made_of(equations: list[core.JaxprEqn], last: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Those that make what the last one reads."""
    wanted, own = set(filter(is_variable, last.invars)), []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars):
            own.append(equation)
            wanted |= set(filter(is_variable, equation.invars))
    return own[::-1]


def _moved(equation: core.JaxprEqn) -> int:
    """Elements that an exchange sends, 0 for all else: loops with exchanges inside may not turn at all."""
    if equation.primitive.name not in _EXCHANGES and not is_named_exchange(equation):
        return 0
    return sum(math.prod(shape(v).shape) for v in equation.invars if is_variable(v))


def is_named_exchange(equation: core.JaxprEqn) -> bool:
    """Whether it is a call of a kernel's exchange."""
    return equation.primitive.name in CALLS and equation.params.get("name") == NAME


def _halves(exchanges: list[core.JaxprEqn], reads: list[core.Var]) -> Apart | None:
    """Of several exchanges, where all of them have halves; `reads` are the operands of all."""
    if not all(map(is_named_exchange, exchanges)):
        return None
    place: dict[Any, int] = {v: n for n, v in enumerate(reads)}
    return apart([[place[v] for v in e.invars] for e in exchanges], [shape(v) for v in reads])


def not_made(equations: list[core.JaxprEqn], outputs: list) -> list[core.Var]:
    """What equations and outputs read that none of the equations makes."""
    made = {v for e in equations for v in e.outvars}
    read = [*(v for e in equations for v in e.invars), *outputs]
    return [v for v in dict.fromkeys(filter(is_variable, read)) if v not in made]


def shape(variable: Any) -> jax.ShapeDtypeStruct:
    """Of a variable."""
    array = variable.aval
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def is_variable(atom) -> bool:
    """Whether it is no constant."""
    return not isinstance(atom, core.Literal)
