"""Reads the text of a compiled program (XLA's HLO): computations, instructions in order, turns of loops.

Nothing here knows what anything costs; `program` does. The syntax is that of `HloModule::ToString` in XLA
(https://github.com/openxla/xla, xla/hlo/parser/hlo_parser.cc).
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPENS = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CLOSES = re.compile(r"\}(, execution_thread=.*)?$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


class Leaf(NamedTuple):
    """An array: its type and sizes, and the memory that it is in (0 for the chip's, others are on it)."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def bytes(self) -> float:
        """Without what tiling pads."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0  # a token has no size
        return math.prod(self.dims) * width / 8


class Instruction(NamedTuple):
    """A line of a computation. `literal` is what stands in place of operands, for constants and the like."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str
    rest: str  # attributes, metadata and backend_config

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The arrays of the result; those of nested tuples one after another."""
        return _leaves(self.shape)

    @property
    def called(self) -> list[str]:
        """Computations that this names: of a loop the condition and the body, in this order."""
        branches = _BRANCHES.search(self.attributes)
        if branches:
            return re.findall(r"[\w.\-]+", branches[1])
        return _CALLED.findall(self.attributes)

    @property
    def attributes(self) -> str:
        """Without metadata and backend_config, which may hold any text."""
        return self.rest.partition(", metadata={")[0].partition(", backend_config=")[0]

    @property
    def op_name(self) -> str:
        """Where in the JAX program this came from; empty where XLA made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str | None:
        """What the group of a pattern matches among the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """The instruction that makes an operand."""
        return self.instructions[instruction.operands[number]]


class Caller(NamedTuple):
    """Where a computation is called from."""

    computation: str
    instruction: Instruction


class Module(NamedTuple):
    """A program. Computations stand before those that call them."""

    computations: dict[str, Computation]
    entry: str
    functions: dict[str, str]  # of the ids of stack frames, the Python function
    callers: dict[str, Caller]  # of computations that are called from one place

    def function(self, instruction: Instruction) -> str:
        """The Python function that an instruction was traced in; empty where the text does not say."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return self.functions.get(frame[1], "") if frame else ""


def parse(text: str) -> Module:
    """The module of an HLO text.

    Raises:
        ValueError: if it has no entry, or is not in the order in which it would run.
    """
    if "is_scheduled=true" not in text[: text.find("\n")]:
        raise ValueError(
            f"The text begins with {text[:40]!r} and not with a module that is_scheduled=true: give what "
            "as_text() of a compiled program returns."
        )
    computations: dict[str, Computation] = {}
    entry, name, body, root = "", "", {}, ""
    for line in text.split("\n"):
        if line.startswith((" ", "\t")) and name:
            instruction = _instruction(line)
            if instruction:
                body[instruction.name] = instruction
                root = instruction.name if line.lstrip().startswith("ROOT") else root
        elif root and _CLOSES.match(line):  # other brackets end something of a kernel's text
            computations[name] = Computation(name, body, body[root])
            name = root = ""
        elif line.startswith(("%", "ENTRY")) and (opened := _OPENS.match(line)):
            name, body, root = opened[2], {}, ""
            entry = name if opened[1] else entry
    if entry not in computations:
        raise ValueError("The text has no ENTRY computation that ends: give all of it.")
    calls: dict[str, list[Caller]] = {}
    for computation in computations.values():
        for instruction in computation.instructions.values():
            for called in instruction.called:
                calls.setdefault(called, []).append(Caller(computation.name, instruction))
    callers = {name: found[0] for name, found in calls.items() if len(found) == 1}
    return Module(computations, entry, _functions(text), callers)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    bracket = line.index("(", end)
    close = _closing(line, bracket)
    inside = line[bracket + 1 : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    literal = "" if operands else inside
    return Instruction(head[2], line[end:bracket].strip(), line[start:end], operands, literal, line[close:])


def _closing(line: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(line, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"A bracket stays open in {line[:80]!r}: give whole lines.")


@cache
def _leaves(shape: str) -> tuple[Leaf, ...]:
    return tuple(_found(shape))


def _found(shape: str) -> Iterator[Leaf]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.replace("<=", "").split(",") if d)
        yield Leaf(dtype, sizes, int(memory[1]) if memory else 0)


def _functions(text: str) -> dict[str, str]:
    """From the tables that stand before the computations."""
    names = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FunctionNames"), re.M))
    locations = dict(re.findall(r"^(\d+) \{.*function_name_id=(\d+)", _table(text, "FileLocations"), re.M))
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", _table(text, "StackFrames"), re.M)
    return {frame: names.get(locations.get(location, ""), "") for frame, location in frames}


def _table(text: str, name: str) -> str:
    start = text.find(f"\n{name}\n")
    return "" if start < 0 else text[start : text.find("\n\n", start + 1)]


def turns(module: Module, loop: Instruction) -> int | None:
    """How often a `while` turns, where the text says so; None where data decide.

    XLA notes it for CPUs and GPUs. For TPUs it is found from the counter's start, step and limit, if these
    are constants, here or wherever the loop's operands come from.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition, body = (module.computations[name] for name in loop.called)
    compared = _operands(module, condition, condition.root, "compare")
    inside = module.callers.get(body.name)
    if compared is None or inside is None or not _is_less_than(module, condition.root):
        return None
    (_, counter), limit = compared
    place = _element(counter)
    if place is None or body.root.opcode != "tuple":
        return None
    start = _at(module, module.computations[inside.computation], loop.operands[0], place)
    step, end = _step(module, body, place), _value(module, *limit)
    if start is None or end is None or step is None or step < 1:
        return None
    return max(0, -(-(end - start) // step))


Made = tuple[Computation, Instruction]
"""An instruction and where it stands."""


def _is_less_than(module: Module, root: Instruction) -> bool:
    compare = module.computations[root.called[0]].root if root.opcode == "fusion" else root
    return compare.attribute(r"direction=(\w+)") == "LT"


def _operands(module: Module, where: Computation, made: Instruction, opcode: str) -> list[Made] | None:
    """Where the two operands come from if an instruction, or a fusion's last one, has this opcode."""
    if made.opcode == "fusion":
        where = module.computations[made.called[0]]
        made = where.root
    return [_source(module, where, name) for name in made.operands] if made.opcode == opcode else None


def _source(module: Module, where: Computation, name: str) -> Made:
    """What made a value, through copies, and through parameters of fusions and calls."""
    made, caller = where.instructions[name], module.callers.get(where.name)
    if made.opcode in _SAME:
        return _source(module, where, made.operands[0])
    if made.opcode == "parameter" and caller and caller.instruction.opcode in ("fusion", "call"):
        operand = caller.instruction.operands[int(made.literal)]
        return _source(module, module.computations[caller.computation], operand)
    return where, made


def _element(made: Instruction) -> int | None:
    place = made.attribute(r"index=(\d+)") if made.opcode == "get-tuple-element" else None
    return None if place is None else int(place)


def _step(module: Module, body: Computation, place: int) -> int | None:
    """What a turn adds to the counter."""
    where, made = _source(module, body, body.root.operands[place])
    added = _operands(module, where, made, "add") or []
    counters = [other for other in added if _element(other[1]) == place]
    values = [_value(module, *other) for other in added if other not in counters]
    return values[0] if len(counters) == len(values) == 1 else None


def _value(module: Module, where: Computation, made: Instruction) -> int | None:
    """The whole number that an instruction gives, if the text says it."""
    if made.opcode == "constant":
        return int(made.literal) if re.fullmatch(r"-?\d+", made.literal) else None
    place = _element(made)
    return None if place is None else _at(module, where, made.operands[0], place)


def _at(module: Module, where: Computation, name: str, place: int) -> int | None:
    """The same of what stands at a place of a tuple, also where loops hand it through unchanged."""
    where, made = _source(module, where, name)
    if made.opcode == "tuple":
        return _value(module, *_source(module, where, made.operands[place]))
    caller = module.callers.get(where.name)
    if made.opcode == "parameter" and caller:
        where, made = module.computations[caller.computation], caller.instruction
    if made.opcode == "while" and _kept(module, made, place):
        return _at(module, where, made.operands[0], place)
    return None


def _kept(module: Module, loop: Instruction, place: int) -> bool:
    """Whether the body hands on an element of its tuple as it got it."""
    body = module.computations[loop.called[1]]
    if body.root.opcode != "tuple":
        return False
    where, made = _source(module, body, body.root.operands[place])
    return where is body and _element(made) == place and body.operand(made, 0).opcode == "parameter"
