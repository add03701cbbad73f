"""What instructions of a compiled program compute and move: FLOPs of products, and bytes of memory.

A fusion reads its operands and writes its results once, whatever is inside. Arrays that XLA keeps on the chip
move nothing, and of an array that is only sliced, or updated in place, only the slice moves.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from tools.planning.groups import KINDS
from tools.planning.hlo import Computation, Instruction, Leaf, Module

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "add-dependency", "while", "conditional", "call",
)  # fmt: skip
_MANAGES = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand has what is new
_VIEWS = ("bitcast", "reshape", "get-tuple-element")


class Flops(NamedTuple):
    """FLOPs of products by the type of their operands; all types of two bytes and more run as BF16 does."""

    bf16: float = 0.0
    fp8: float = 0.0


@dataclass(frozen=True)
class Work:
    """Answers for the instructions of one module."""

    module: Module
    _flops: dict[str, Flops] = field(default_factory=dict)  # of computations
    _users: dict[str, dict[str, list[Instruction]]] = field(default_factory=dict)

    def flops(self, where: Computation, instruction: Instruction) -> Flops:
        """Of the products in an instruction and in what it calls; not of loops and branches."""
        if instruction.opcode in ("fusion", "call"):
            return self._inside(instruction.called[0])
        if instruction.opcode not in ("dot", "convolution", "custom-call"):
            return Flops()
        operands = _operands(where, instruction)
        made = _MAKERS[instruction.opcode](instruction, operands) or 0.0
        narrow = [leaf for leaf in operands if leaf.dtype.startswith("f8")]
        return Flops(0.0, made) if len(narrow) > 1 else Flops(made)

    def unknown(self, where: Computation, instruction: Instruction) -> str | None:
        """The name of a kernel whose FLOPs cannot be told."""
        if instruction.opcode != "custom-call" or _target(instruction) in _MANAGES:
            return None
        known = _kernel(instruction, _operands(where, instruction))
        return _name(instruction) if known is None else None

    def bytes(self, where: Computation, instruction: Instruction) -> float:
        """Read from the chip's memory and written to it."""
        opcode = instruction.opcode
        base, _, half = opcode.rpartition("-")
        if half == "done" and base in KINDS:
            return _in_memory(instruction.leaves)
        if opcode in _FREE or half in ("done", "update") or _target(instruction) in _MANAGES:
            return 0.0
        if half == "start" and base not in KINDS:  # of a copy, or of a slice
            first = len(instruction.operands) if base == "fusion" else 1
            there, here = instruction.leaves[0], instruction.leaves[first]
            return here.bytes * ((there.memory == 0) + (here.memory == 0))
        read = 0.0
        for number, name in enumerate(instruction.operands):
            most = _in_memory(where.instructions[name].leaves)
            read += min(most, self._read(instruction, number, most))
        return read if half == "start" else read + self._written(where, instruction)

    def _inside(self, name: str) -> Flops:
        if name not in self._flops:
            inside = self.module.computations[name]
            flops = (self.flops(inside, i) for i in inside.instructions.values())
            self._flops[name] = Flops(*map(sum, zip(Flops(), *flops, strict=True)))
        return self._flops[name]

    def _read(self, instruction: Instruction, number: int, most: float) -> float:
        """Bytes of an operand that an instruction reads; `most` where it reads all."""
        if instruction.opcode in _SLICES and number == 0:
            return min(most, sum(leaf.bytes for leaf in instruction.leaves))
        if instruction.opcode in _UPDATES and number == 0:
            return 0.0
        if instruction.opcode != "fusion" or not most:
            return most
        inside = self.module.computations[instruction.called[0]]
        parameter = next(
            i for i in inside.instructions.values() if i.opcode == "parameter" and i.literal == str(number)
        )
        return self._used(inside, parameter, most)

    def _used(self, inside: Computation, made: Instruction, most: float) -> float:
        read = 0.0
        for user in self._users_in(inside).get(made.name, []):
            if user.opcode in _VIEWS or self._retiles(user):
                read += self._used(inside, user, most)
            else:
                read += max(
                    self._read(user, n, most) for n, name in enumerate(user.operands) if name == made.name
                )
        return most if made is inside.root else min(most, read)

    def _retiles(self, inner: Instruction) -> bool:
        """Whether a fusion inside another reads its operand in other tiles, and writes nothing to memory."""
        if inner.opcode != "fusion" or len(inner.operands) != 1:
            return False
        inside = self.module.computations[inner.called[0]]
        return inside.root.opcode == "copy" and inside.operand(inside.root, 0).opcode == "parameter"

    def _users_in(self, inside: Computation) -> dict[str, list[Instruction]]:
        if inside.name not in self._users:
            users: dict[str, list[Instruction]] = {}
            for instruction in inside.instructions.values():
                for name in set(instruction.operands):
                    users.setdefault(name, []).append(instruction)
            self._users[inside.name] = users
        return self._users[inside.name]

    def _written(self, where: Computation, instruction: Instruction) -> float:
        """Bytes of results; where one is another array updated in place, of what is new."""
        if instruction.opcode in _UPDATES:
            new = where.operand(instruction, _UPDATES[instruction.opcode])
            return min(_in_memory(instruction.leaves), sum(leaf.bytes for leaf in new.leaves))
        if instruction.opcode != "fusion":
            return _in_memory(instruction.leaves)
        inside = self.module.computations[instruction.called[0]]
        roots = [inside.root]
        if inside.root.opcode == "tuple":
            roots = [inside.instructions[name] for name in inside.root.operands]
        written = 0.0
        for leaf, root in zip(instruction.leaves, roots, strict=len(roots) > 1):
            while root.opcode in _VIEWS:
                root = inside.operand(root, 0)
            new = self._written(inside, root) if root.opcode in (*_UPDATES, "fusion") else leaf.bytes
            written += min(_in_memory([leaf]), new)
        return written


def _operands(where: Computation, instruction: Instruction) -> list[Leaf]:
    return [leaf for name in instruction.operands for leaf in where.instructions[name].leaves]


def _matrices(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Without what tells a kernel where to look, which stands before."""
    return [leaf for leaf in leaves if leaf.dtype.startswith(("f", "bf")) and len(leaf.dims) > 1]


def _in_memory(leaves: Sequence[Leaf]) -> float:
    return sum(leaf.bytes for leaf in leaves if leaf.memory == 0)


def _target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"') or "" if instruction.rest else ""


def _name(instruction: Instruction) -> str:
    """Of a kernel: that which it has in JAX, or by which XLA calls it."""
    target = _target(instruction)
    if target == "mosaic_gpu_v2":  # the last jitted function that it was traced in
        return "hopper_" + (re.findall(r"jit\((\w+)\)", instruction.op_name) or ["kernel"])[-1]
    return instruction.name.partition(".")[0] if target == "tpu_custom_call" else target


def _dot(instruction: Instruction, operands: Sequence[Leaf]) -> float:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    depth = math.prod(operands[0].dims[int(n)] for n in contracted.split(",") if n)
    return 2.0 * math.prod(instruction.leaves[0].dims) * depth


def _convolution(instruction: Instruction, operands: Sequence[Leaf]) -> float:
    """Of elements that meet: XLA writes batched products as windows that mostly lie outside."""
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    assert labels
    left, right, out = re.split(r"_|->", labels)
    made = instruction.leaves[0].dims
    flops = 2.0 * made[out.index("b")] * made[out.index("f")] * operands[1].dims[right.index("i")]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    for place, axis in enumerate(c for c in sorted(left) if c.isdigit()):
        given = dict(part.split("=") for part in window.split())
        one = {key: value.split("x")[place] for key, value in given.items()}
        flops *= _meetings(
            made[out.index(axis)],
            operands[0].dims[left.index(axis)],
            int(one.get("size", 1)),
            int(one.get("stride", 1)),
            int(one.get("pad", "0_0").partition("_")[0]),
            int(one.get("lhs_dilate", 1)),
            int(one.get("rhs_dilate", 1)),
        )
    return flops


@cache
def _meetings(out: int, inside: int, size: int, stride: int, pad: int, spread: int, apart: int) -> int:
    """How often, along an axis, an element of the window stands on one of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * apart - pad
    return int(np.sum((at >= 0) & (at <= (inside - 1) * spread) & (at % spread == 0)))


def _kernel(instruction: Instruction, operands: Sequence[Leaf]) -> float | None:
    """What a kernel says of itself, or what follows from its name and shapes; None where neither helps."""
    said = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.rest)
    if said:
        return float(said[1])
    rule = _KERNELS.get(_name(instruction))
    return rule(_matrices(operands), instruction.leaves) if rule else None


def _product(floats: Sequence[Leaf], made: Sequence[Leaf]) -> float:
    """Rows [M, K] by a matrix, or by those of groups, all rows counted as if there were something in them."""
    return 2.0 * math.prod(floats[0].dims) * made[0].dims[-1]


def _attention(products: Callable[[int, int], int]) -> Callable[[Sequence[Leaf], Sequence[Leaf]], float]:
    """Products of each query with the keys up to its own, of one document; arrays are [B, H, S, width]."""

    def flops(floats: Sequence[Leaf], made: Sequence[Leaf]) -> float:
        (batch, heads, length, width), others = floats[0].dims, (*floats[1:], *made)
        widths = [x.dims[3] for x in others if x.dims[2] == length]
        value = next((other for other in widths if other != width), width)
        return batch * heads * length * (length + 1) * products(width, value)

    return flops


def _hopper_attention(floats: Sequence[Leaf], made: Sequence[Leaf]) -> float:
    """The same where arrays are [B, S, H, width] and kernels tell what they are by what they make."""
    batch, length, heads, _ = floats[0].dims
    widths = {x.dims[3] for x in floats if len(x.dims) == 4}
    key, value = max(widths), min(widths)
    sums = [leaf.dims[3] for leaf in made if len(leaf.dims) == 4]
    if len(made) > len(sums):  # the logarithms of the sums beside the values
        return batch * heads * length * (length + 1) * (key + value)
    return batch * heads * length * (length + 1) * (key + value + sum(sums))


# By the names that `pallas_kernels` gives them; what products are of widths of keys and of values.
_KERNELS: dict[str, Callable[[Sequence[Leaf], Sequence[Leaf]], float]] = {
    "matmul": _product,
    "matmul_transposed": _product,
    "weight_gradient": _product,
    "fp8_matmul": _product,
    "fp8_weight_gradient": _product,
    **dict.fromkeys(("quantize", "blocks", "transposed", "swiglu", "swiglu_transposed"), lambda *_: 0.0),
    **dict.fromkeys(("swiglu_backward", "pack", "unpack"), lambda *_: 0.0),
    "mla_attention_forward": _attention(lambda key, value: key + value),
    "mla_attention_query_gradient": _attention(lambda key, value: 2 * key + value),
    "mla_attention_key_gradient": _attention(lambda key, value: 2 * key + 2 * value),
}
# Those for Hopper bear the names of the functions that call them.
_KERNELS |= {f"hopper_{name}": rule for name, rule in _KERNELS.items() if not name.startswith("mla")}
_KERNELS |= dict.fromkeys(("hopper_forward", "hopper_backward"), _hopper_attention)
_MAKERS = {"dot": _dot, "convolution": _convolution, "custom-call": _kernel}
