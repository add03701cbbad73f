"""Cuts a program into phases, each of which computes what it must and hands on what later ones need.

A layer's forward, its gradient of inputs and its gradient of weights are written as one program, with
`jax.vjp`, and cut apart here. What the first phase hands on is then what a backward pass keeps of a forward,
and what the second hands on is what a gradient of weights that waits still needs.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dsv3_jax.pipeline.stops import (
    CALLS,
    Part,
    Steps,
    finish,
    is_named_exchange,
    is_variable,
    not_made,
    parts,
    shape,
    taken,
)

_AGAIN = ("remat", "remat2", "checkpoint")  # of what a policy has not kept
_CALLS = (*CALLS, *_AGAIN)


@dataclass(frozen=True, eq=False)
class Phase:
    """One part of a program."""

    constants: dict[core.Var, Any]
    inputs: list[core.Var]
    parts: list[Part]
    outputs: list
    handed_on: list[core.Var]
    structure: Any  # of the outputs

    @property
    def hands_on(self) -> list[jax.ShapeDtypeStruct]:
        """What the next phase needs of this one and of those before."""
        return [shape(v) for v in self.handed_on]

    @property
    def stops(self) -> int:
        """How often it waits for exchanges that move more than half as much as the one that moves most."""
        return sum(part.stops for part in self.parts)

    def steps(self, lasting, handed: list, *given) -> Steps:
        """Yields exchanges, and returns the outputs and what is handed on, as `run` does."""
        values = dict(self.constants)
        values |= zip(self.inputs, jax.tree.leaves((lasting, handed, given)), strict=True)
        yield from taken(self.parts, values)
        outputs = [values[v] if is_variable(v) else jnp.asarray(v.val) for v in self.outputs]
        return jax.tree.unflatten(self.structure, outputs), [values[v] for v in self.handed_on]

    def run(self, lasting, handed: list, *given) -> tuple[Any, list[jax.Array]]:
        """The outputs of this phase, and a list of arrays that the next one takes as `handed`.

        The first phase takes [].
        """
        return finish(self.steps(lasting, handed, *given))


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
    targets = [[*w, *p] for w, p in zip(wanted, opened.packed(wanted, source), strict=True)]
    chosen = opened.split(targets, source, opened.computed_from(lasting_variables))
    unmade = [not_made(*of_phase) for of_phase in zip(chosen, wanted, strict=True)]
    handed: list[list[core.Var]] = [[]]
    for phase in range(1, len(inputs)):
        later = set(itertools.chain(*unmade[phase:]))
        handed.append([v for v in source if v in later and source[v] < phase])
    handed.append([])
    phases = []
    for phase, equations in enumerate(chosen):
        needed = [v for v in (*wanted[phase], *handed[phase + 1]) if is_variable(v)]
        phases.append(
            Phase(
                opened.constants,
                [*lasting_variables, *handed[phase], *given[phase]],
                parts(closed.jaxpr, equations, needed),
                wanted[phase],
                handed[phase + 1],
                jax.tree.structure(outputs[phase]),
            )
        )
    return phases


class _Opened:
    """A program without calls: equations in order, each variable assigned once."""

    def __init__(self, closed: core.ClosedJaxpr):
        self.constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.equations: list[core.JaxprEqn] = []
        self.kept: set[core.Var] = set()  # what has a name and is not computed again
        names = {}
        self._open(closed.jaxpr, names)
        self.outputs = [_renamed(v, names) for v in closed.jaxpr.outvars]

    def _open(self, jaxpr: core.Jaxpr, names: dict) -> None:
        for equation in jaxpr.eqns:
            operands = [_renamed(v, names) for v in equation.invars]
            if equation.primitive.name in _CALLS and not is_named_exchange(equation):
                kept = set(self.kept)
                names |= zip(equation.outvars, self._call(equation.params["jaxpr"], operands), strict=True)
                self.kept = kept if equation.primitive.name in _AGAIN else self.kept
            else:
                fresh = [core.Var(v.aval) for v in equation.outvars]
                self.kept |= set(fresh) if equation.primitive.name == "name" else set()
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
            if not equation.effects and all(v in known for v in equation.invars if is_variable(v)):
                known |= set(equation.outvars)
        return known

    def packed(self, wanted: Sequence[list], source: dict) -> list[list[core.Var]]:
        """What each phase is to compute for later ones, as it has a name under which it is kept.

        A later phase could compute it too, from something larger that it is made of.
        """
        maker = {v: e for e in self.equations for v in e.outvars}
        first = dict(source)  # the phase that has all that a variable is computed from
        for equation in self.equations:
            phase = max((first.get(v, 0) for v in filter(is_variable, equation.invars)), default=0)
            first |= dict.fromkeys(equation.outvars, phase)
        found: list[dict] = [{} for _ in wanted]
        for phase in reversed(range(len(wanted))):
            seen, pending = set(), [*filter(is_variable, wanted[phase]), *found[phase]]
            while pending:
                variable = pending.pop()
                if variable in seen:
                    continue
                seen.add(variable)
                if variable in self.kept and first[variable] < phase:
                    found[first[variable]][variable] = None
                elif variable in maker:
                    pending += filter(is_variable, maker[variable].invars)
        return [list(variables) for variables in found]

    def split(self, wanted: Sequence[list], source: dict, lasting: set) -> list[list[core.JaxprEqn]]:
        """The equations of each phase; adds to `source` the phase that computes a variable first."""
        maker = {v: e for e in self.equations for v in e.outvars}
        phases = []
        for phase, outputs in enumerate(wanted):
            needed, pending = set(), [v for v in outputs if is_variable(v)]
            while pending:
                variable = pending.pop()
                equation = maker.get(variable)
                if source.get(variable, phase) > phase:
                    raise ValueError(
                        f"Phase {phase} needs an input of phase {source[variable]}: give it that earlier."
                    )
                if equation is None or id(equation) in needed:
                    continue
                if variable in source and not _widens(equation):
                    continue
                needed.add(id(equation))
                pending += [v for v in equation.invars if is_variable(v)]
            phases.append([e for e in self.equations if id(e) in needed])
            made = [v for e in phases[-1] for v in e.outvars if v not in lasting]
            source |= {v: phase for v in made if v not in source}
        return phases


def _widens(equation: core.JaxprEqn) -> bool:
    """Whether it turns BF16 into FP32, or the like: handed on is then what is narrow."""
    if equation.primitive.name != "convert_element_type":
        return False
    narrow, wide = (shape(v).dtype.itemsize for v in (*equation.invars, *equation.outvars))
    return narrow < wide


def _renamed(atom, names: dict):
    return names.get(atom, atom) if is_variable(atom) else atom
