"""Cuts a program into phases, each of which computes what it must and hands on what later ones need.

A layer's forward, its gradient of inputs and its gradient of weights are written as one program, with
`jax.vjp`, and cut apart here. What the first phase hands on is then what a backward pass keeps of a forward,
and what the second hands on is what a gradient of weights that waits still needs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

_CALLS = ("jit", "pjit", "remat", "remat2", "checkpoint", "closed_call")


class Phase(NamedTuple):
    """One part of a program.

    `run(lasting, handed, *inputs)` gives the outputs of this phase and a list of arrays for the next one,
    which that one takes as `handed`; the first takes [].
    """

    run: Callable[..., tuple[Any, list[jax.Array]]]
    hands_on: list[jax.ShapeDtypeStruct]


def cut(program: Callable, lasting: Any, *inputs: tuple) -> list[Phase]:
    """Cuts `program(lasting, *inputs)`, whose outputs are a tuple with one entry for each phase.

    Args:
        program: anything that JAX traces. Calls and checkpoints in it are opened, so that what they recompute
            is recomputed by the phase that needs it. Run phases in loops of their own, or XLA may find that
            it has been computed before, and keep it.
        lasting: arguments that every phase gets again, such as weights; nothing computed from them alone is
            handed on.
        inputs: the arguments that each phase gets anew, a tuple for each phase, empty where none.

    Raises:
        ValueError: if a phase needs what only a later one gets.
    """
    closed, outputs = jax.make_jaxpr(program, return_shape=True)(lasting, *inputs)
    assert len(outputs) == len(inputs), "one output for each phase"
    opened = _Opened(closed)
    variables = iter(closed.jaxpr.invars)
    lasting_variables = [next(variables) for _ in jax.tree.leaves(lasting)]
    given = [[next(variables) for _ in jax.tree.leaves(entry)] for entry in inputs]
    results = iter(opened.outputs)
    wanted = [[next(results) for _ in jax.tree.leaves(entry)] for entry in outputs]

    source = {v: phase for phase, variables in enumerate(given) for v in variables}
    chosen = opened.split(wanted, source, opened.computed_from(lasting_variables))
    handed: list[list[core.Var]] = [[]]
    for phase in range(1, len(inputs)):
        later = {v for equations in chosen[phase:] for e in equations for v in e.invars if _is_variable(v)}
        later |= {v for variables in wanted[phase:] for v in variables if _is_variable(v)}
        handed.append([v for v in source if v in later and source[v] < phase])
    handed.append([])
    return [
        Phase(
            _evaluator(
                [*lasting_variables, *handed[phase], *given[phase]],
                opened,
                chosen[phase],
                wanted[phase],
                handed[phase + 1],
                jax.tree.structure(outputs[phase]),
            ),
            [_shape(v) for v in handed[phase + 1]],
        )
        for phase in range(len(inputs))
    ]


class _Opened:
    """A program without calls: equations in order, each variable assigned once."""

    def __init__(self, closed: core.ClosedJaxpr):
        self.whole = closed.jaxpr
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.equations: list[core.JaxprEqn] = []
        names = {}
        self._open(closed.jaxpr, names)
        self.outputs = [_renamed(v, names) for v in closed.jaxpr.outvars]

    def _open(self, jaxpr: core.Jaxpr, names: dict) -> None:
        for equation in jaxpr.eqns:
            operands = [_renamed(v, names) for v in equation.invars]
            if equation.primitive.name in _CALLS:
                names |= zip(equation.outvars, self._call(equation.params["jaxpr"], operands), strict=True)
            else:
                fresh = [core.Var(v.aval) for v in equation.outvars]
                names |= zip(equation.outvars, fresh, strict=True)
                self.equations.append(equation.replace(invars=operands, outvars=fresh))

    def _call(self, called: core.Jaxpr | core.ClosedJaxpr, operands: list) -> list:
        jaxpr, constants = (
            (called.jaxpr, called.consts) if isinstance(called, core.ClosedJaxpr) else (called, [])
        )
        inner = dict(zip(jaxpr.invars, operands, strict=True))
        for variable, value in zip(jaxpr.constvars, constants, strict=True):
            inner[variable] = core.Var(variable.aval)
            self.constants[inner[variable]] = value
        self._open(jaxpr, inner)
        return [_renamed(v, inner) for v in jaxpr.outvars]

    def computed_from(self, variables: list[core.Var]) -> set[core.Var]:
        """These variables, the constants, and all that is computed from them alone."""
        known = {*variables, *self.constants}
        for equation in self.equations:
            if not equation.effects and all(v in known for v in equation.invars if _is_variable(v)):
                known |= set(equation.outvars)
        return known

    def split(self, wanted: Sequence[list], source: dict, lasting: set) -> list[list[core.JaxprEqn]]:
        """The equations of each phase; adds to `source` the phase that computes a variable first."""
        maker = {v: e for e in self.equations for v in e.outvars}
        phases = []
        for phase, outputs in enumerate(wanted):
            needed, pending = set(), [v for v in outputs if _is_variable(v)]
            while pending:
                variable = pending.pop()
                equation = maker.get(variable)
                if source.get(variable, phase) > phase:
                    raise ValueError(
                        f"Phase {phase} needs an input of phase {source[variable]}: give it that earlier."
                    )
                if equation is None or variable in source or id(equation) in needed:
                    continue
                needed.add(id(equation))
                pending += [v for v in equation.invars if _is_variable(v)]
            phases.append([e for e in self.equations if id(e) in needed])
            made = [v for e in phases[-1] for v in e.outvars if v not in lasting]
            source |= {v: phase for v in made if v not in source}
        return phases


def _evaluator(inputs, opened: _Opened, equations, outputs, hands_on, structure) -> Callable:
    variables = [*opened.constants, *inputs]
    jaxpr = opened.whole.replace(
        constvars=[], invars=variables, outvars=[*outputs, *hands_on], eqns=equations
    )
    evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))

    def run(lasting, handed, *given):
        values = evaluate(*opened.constants.values(), *jax.tree.leaves((lasting, handed, given)))
        return jax.tree.unflatten(structure, values[: len(outputs)]), values[len(outputs) :]

    return run


def _shape(variable: core.Var) -> jax.ShapeDtypeStruct:
    array: Any = variable.aval
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _renamed(atom, names: dict):
    return names.get(atom, atom) if _is_variable(atom) else atom


def _is_variable(atom) -> bool:
    return not isinstance(atom, core.Literal)
