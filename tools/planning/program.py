"""What a compiled program does in a step: FLOPs, bytes, collectives, and how much of these compute hides.

It is read from the text that XLA schedules, so an estimate and no measurement: an instruction takes as long
as its products at peak rate or its bytes at full bandwidth, whichever is longer, a collective as long as its
bytes at full bandwidth of the links, and one core does one thing at a time.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dsv3_jax.mesh import EXPERT
from dsv3_jax.ops.context import SCOPE
from tools.planning import groups, hlo
from tools.planning.costs import Collectives, Cost, Costly, Transfer, added, grouped, longest
from tools.planning.groups import KINDS, Sizes, Span, as_opcode
from tools.planning.hlo import Computation, Instruction
from tools.planning.overlap import Compute, Done, Start, hidden
from tools.planning.work import Work

# Those over the expert axis alone, of tokens to their experts and of heads to other positions.
EXPERT_ALL_TO_ALL, CONTEXT_ALL_TO_ALL = "expert_all_to_all", "context_all_to_all"
_SENT: dict[str, Callable[[float, int], float]] = {  # of a device's operand in a group of n, around a ring
    "all_to_all": lambda size, n: size * (n - 1) / n,
    "all_gather": lambda size, n: size * (n - 1),
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "all_reduce": lambda size, n: 2 * size * (n - 1) / n,
    "collective_permute": lambda size, n: size,
}
_BY_AXIS = ("all_gather", "reduce_scatter", "all_reduce")  # those that shrink on the way, or grow
_ENTERED = ("while", "conditional", "call")


class Rates(NamedTuple):
    """What a device does in a second."""

    bf16: float  # FLOPs
    fp8: float
    memory: float  # bytes
    links: Mapping[str, float]  # bytes that it sends over each axis of the mesh


class Loop(NamedTuple):
    """A loop that turns as often as data ask for."""

    name: str  # of the instruction
    op_name: str  # where in the JAX program it came from, scopes included
    function: str  # the Python function that it was traced in


class Program(NamedTuple):
    """What a device does in a step."""

    flops: float
    bytes: float
    seconds: float  # of compute
    collectives: dict[str, Collectives]  # by kind
    by_axes: dict[tuple[str, tuple[str, ...]], Collectives]  # by kind and the axes that devices meet over
    costly: list[Costly]
    exposed: list[Costly]  # collectives
    loops: dict[Loop, float]  # turns that the text does not say, as the caller gave them
    unknown: dict[str, float]  # kernels whose FLOPs are not counted, and how often they run


def read(
    text: str,
    mesh_shape: Mapping[str, int],
    rates: Rates,
    loop_turns: Callable[[Loop], float] = lambda _: 1.0,
    filled: float = 1.0,
) -> Program:
    """Reads `compiled.as_text()`.

    Of a collective that starts and ends apart, what stands between in the same computation hides as much as
    it lasts, whole loops among it; `overlap.hidden` says how several share it.

    Args:
        mesh_shape: axes and sizes in the order of the mesh, whose devices are numbered by position.
        rates: of a device.
        loop_turns: how often a loop turns on average where it depends on data.
        filled: how much of the rows that there is room for there are, where kernels send no others.

    Raises:
        ValueError: if the text is no scheduled program, or not one of this mesh, or a rate is missing.
    """
    missing = [axis for axis, size in mesh_shape.items() if size > 1 and axis not in rates.links]
    if missing:
        raise ValueError(
            f"Rates of links name {[*rates.links]}, but not the axes {missing}: give theirs too."
        )
    reader = _Reader(hlo.parse(text), tuple(mesh_shape.items()), rates, loop_turns, filled)
    transfers, costs, unknown = [], [], {}
    for name, weight in reader.weights().items():
        if not weight:
            continue
        where = reader.module.computations[name]
        transfers += [(weight, transfer) for transfer in reader.transfers(where)]
        for instruction in where.instructions.values():
            if instruction.opcode not in _ENTERED:
                costs.append((weight, reader.cost(where, instruction), instruction))
            kernel = reader.work.unknown(where, instruction)
            if kernel:
                unknown[kernel] = unknown.get(kernel, 0.0) + weight
    total = reader.total(reader.module.entry)
    return Program(
        total.flops,
        total.bytes,
        total.seconds,
        grouped(transfers, lambda t: t.kind),
        grouped(transfers, lambda t: (t.kind, t.span.axes)),
        longest((w * cost.seconds, w, instruction) for w, cost, instruction in costs),
        longest((w * (t.seconds - t.hidden), w, t.instruction) for w, t in transfers),
        reader.assumed,
        unknown,
    )


class _Reader:
    """Costs of one module, each computed once."""

    def __init__(
        self,
        module: hlo.Module,
        mesh: Sizes,
        rates: Rates,
        loop_turns: Callable[[Loop], float],
        filled: float,
    ):
        self.module, self.mesh, self.rates = module, mesh, rates
        self.loop_turns, self.filled = loop_turns, filled
        self.work, self.assumed = Work(module), {}
        self._totals: dict[str, Cost] = {}
        self._transfers: dict[str, list[Transfer]] = {}
        self._axes: dict[str, frozenset[str]] = {}

    def total(self, name: str) -> Cost:
        """Of a computation, once through."""
        if name not in self._totals:
            where = self.module.computations[name]
            costs = (self.cost(where, instruction) for instruction in where.instructions.values())
            self._totals[name] = added(costs)
        return self._totals[name]

    def cost(self, where: Computation, instruction: Instruction) -> Cost:
        """Of an instruction. What runs beside compute (copies, collectives, other cores) takes it no time."""
        opcode = instruction.opcode
        if opcode == "while":
            condition, body = map(self.total, instruction.called)
            return added([condition, body]).times(self.turns(instruction))
        if opcode == "conditional":
            branches = [self.total(name) for name in instruction.called]
            return max(branches, key=lambda c: c.seconds)._replace(least=min(c.least for c in branches))
        if opcode == "call":
            return self.total(instruction.called[0])
        if _wraps(instruction):
            return self.total(instruction.called[0])._replace(seconds=0.0, least=0.0)
        moved, called = self.work.bytes(where, instruction), as_opcode(instruction)
        if called.endswith(("-start", "-done")) or called in KINDS:
            return Cost(0.0, moved)
        flops = self.work.flops(where, instruction)
        products = flops.bf16 / self.rates.bf16 + flops.fp8 / self.rates.fp8
        seconds = max(products, moved / self.rates.memory)
        return Cost(sum(flops), moved, seconds, seconds)

    def turns(self, loop: Instruction) -> float:
        """Of a `while`."""
        known = hlo.turns(self.module, loop)
        if known is not None:
            return known
        question = Loop(loop.name, loop.op_name, self.module.function(loop))
        if question not in self.assumed:
            self.assumed[question] = self.loop_turns(question)
        return self.assumed[question]

    def weights(self) -> dict[str, float]:
        """How often each computation runs in a step, callers before what they call."""
        weights = {self.module.entry: 1.0}
        for name in reversed(self.module.computations):
            where = self.module.computations[name]
            for instruction in where.instructions.values() if name in weights else ():
                called, turns = instruction.called, 1.0
                if instruction.opcode == "while":
                    turns = self.turns(instruction)
                elif instruction.opcode == "conditional":
                    called = [max(called, key=lambda branch: self.total(branch).seconds)]
                elif instruction.opcode != "call":
                    continue
                for inner in called:
                    weights[inner] = weights.get(inner, 0.0) + turns * weights[name]
        return weights

    def axes(self, name: str) -> frozenset[str]:
        """Those that a computation's collectives go over, and those of what it calls."""
        if name not in self._axes:
            where = self.module.computations[name]
            entered = [i for i in where.instructions.values() if i.opcode in _ENTERED]
            inside = [self.axes(called) for instruction in entered for called in instruction.called]
            own = [t.span.axes for t in self.transfers(where)]
            self._axes[name] = frozenset().union(*own, *inside)
        return self._axes[name]

    def transfers(self, where: Computation) -> list[Transfer]:
        """The collectives of a computation, with what compute hides of them; see `overlap.hidden`."""
        if where.name not in self._transfers:
            self._transfers[where.name] = self._scheduled(where)
        return self._transfers[where.name]

    def _scheduled(self, where: Computation) -> list[Transfer]:
        found, events, ways = [], [], {}
        for instruction in where.instructions.values():
            opcode = as_opcode(instruction)
            source = next((ways[name] for name in instruction.operands if name in ways), None)
            if source is not None and opcode.endswith(("-update", "get-tuple-element")):
                ways[instruction.name] = source
            elif source is not None and opcode.endswith("-done"):
                events += [Done(n) for n in source]
            elif opcode.endswith("-start") or opcode in KINDS or opcode == "fusion":
                begun = self._collectives(where, instruction)
                numbers = range(len(found), len(found) + len(begun))
                events += [Start(n, t.span.axes, t.seconds) for n, t in zip(numbers, begun, strict=True)]
                if opcode.endswith("-start"):
                    ways[instruction.name] = numbers
                    begun = [t._replace(asynchronous=1) for t in begun]
                else:
                    events += map(Done, numbers)
                found += begun
                events.append(Compute(self.cost(where, instruction).least))
            else:
                idle = opcode == "while" and not self.turns(instruction)
                inside = map(self.axes, instruction.called if opcode in _ENTERED and not idle else ())
                events.append(Compute(self.cost(where, instruction).least, frozenset().union(*inside)))
        share = hidden(events)
        return [t._replace(hidden=share[n]) for n, t in enumerate(found)]

    def _collectives(self, where: Computation, instruction: Instruction) -> list[Transfer]:
        """Those that an instruction is or wraps."""
        kind = KINDS.get(as_opcode(instruction).removesuffix("-start"))
        if instruction.opcode == "custom-call":
            if kind is None:
                return []
            span, most = groups.kernel(instruction, self.mesh)
            return [self._transfer(kind, span, self.filled * most, instruction)]
        if kind is None:
            wraps = _wraps(instruction) or instruction.opcode in ("fusion", "call")
            inner = [self.module.computations[name] for name in instruction.called if wraps]
            return [t for c in inner for i in c.instructions.values() for t in self._collectives(c, i)]
        pairs = instruction.attribute(r"source_target_pairs=(\{(?:\{[\d,]+\},?)*\})")
        group = instruction.attribute(r"replica_groups=(mesh\[[^}]*\}|\[\S*[\])]|\{(?:\{[\d,]*\},?)*\})")
        span = groups.crossed(pairs, self.mesh) if pairs else groups.spanned(group or "{}", self.mesh)
        size = sum(leaf.bytes for name in instruction.operands for leaf in where.instructions[name].leaves)
        sent = _SENT[kind](size, span.devices) if span.axes else 0.0
        return [self._transfer(kind, span, sent, instruction)]

    def _transfer(self, kind: str, span: Span, sent: float, instruction: Instruction) -> Transfer:
        seconds = self._seconds(kind, span, sent)
        if (kind, span.axes) == ("all_to_all", (EXPERT,)):
            of_context = re.search(rf"\b{SCOPE}\b", instruction.op_name)
            kind = CONTEXT_ALL_TO_ALL if of_context else EXPERT_ALL_TO_ALL
        return Transfer(kind, span, sent, seconds, 0.0, 0, instruction)

    def _seconds(self, kind: str, span: Span, sent: float) -> float:
        """A sum over several axes is taken along the fastest first, so that each further one carries less."""
        links = sorted(((self.rates.links[a], size) for a, size in self.mesh if a in span.axes), reverse=True)
        if kind not in _BY_AXIS or len(links) < 2 or math.prod(size for _, size in links) != span.devices:
            return sent / min((rate for rate, _ in links), default=1.0)
        seconds, left = 0.0, sent / (1 - 1 / span.devices)
        for rate, size in links:
            seconds += left * (1 - 1 / size) / rate
            left /= size
        return seconds


def _wraps(instruction: Instruction) -> list[str]:
    """The computation that runs beside others, where an instruction starts one."""
    return instruction.called if instruction.opcode in ("async-start", "call-start") else []
