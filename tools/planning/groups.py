"""Which devices a collective connects, and which axes of a mesh they differ in.

XLA writes groups in three ways: one by one, {{0,1},{2,3}}; as the rows of a transposed count,
[2,2]<=[2,2]T(1,0); and by the axes of a mesh, mesh['a'=2,'b'=2] {'b'}, where 'b':(1)2 is a part of an axis.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from tools.planning.hlo import Instruction

Sizes = tuple[tuple[str, int], ...]
"""The axes of a mesh with their sizes, the last one changing fastest with a device's number."""


KINDS = {  # of collectives, by opcode
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "collective-permute": "collective_permute",
}


_SENT = r'"remote_bytes_transferred":"?(\d+)'
_KERNEL = re.compile(r"([a-z]+)_all_to_all(?:_(start|done))?(?:\.|$)")  # and the axis that it goes over


class Span(NamedTuple):
    """The axes in which devices of a group differ, in the mesh's order, and how many meet in the largest."""

    axes: tuple[str, ...]
    devices: int


def as_opcode(instruction: Instruction) -> str:
    """The opcode; of a kernel that exchanges, or of half of one, that of what XLA would have in its place."""
    named = _KERNEL.match(instruction.name) if instruction.opcode == "custom-call" else None
    if named is None:
        return instruction.opcode
    return f"all-to-all-{named[2]}" if named[2] else "all-to-all"


def kernel(instruction: Instruction, mesh: Sizes) -> tuple[Span, float]:
    """What a kernel that exchanges spans, and the bytes that it says it sends at most.

    Raises:
        ValueError: if it is none.
    """
    named, sent = _KERNEL.match(instruction.name), re.search(_SENT, instruction.rest)
    if named is None or sent is None:
        raise ValueError(f"{instruction.name} is no kernel that says over which axis it sends how much.")
    return Span((named[1],), dict(mesh)[named[1]]), float(sent[1])


@cache
def spanned(text: str, mesh: Sizes) -> Span:
    """What groups written as XLA writes them span."""
    return _span(expand(text, math.prod(size for _, size in mesh)), mesh)


@cache
def crossed(text: str, mesh: Sizes) -> Span:
    """What source_target_pairs, {{0,1},{1,2}}, span; no axes if devices send to themselves alone."""
    return _span(_lists(text), mesh)


def expand(text: str, devices: int) -> Sequence[Sequence[int]]:
    """The numbers of the devices of each group; {} is all in one.

    Raises:
        ValueError: if the text is in none of the three forms, or names devices that the mesh lacks.
    """
    if text.startswith("mesh["):
        groups = _by_axes(text)
    elif "<=" in text:
        groups = _by_count(text)
    elif text.startswith("{"):
        groups = _lists(text) or [range(devices)]
    else:
        raise _unknown(text)
    most = max((max(group) for group in groups if len(group)), default=0)
    if most >= devices:
        raise ValueError(
            f"{text[:80]} names device {most} but the mesh has {devices}: give the sizes of the mesh that "
            "the program was compiled for."
        )
    return groups


def _lists(text: str) -> Sequence[Sequence[int]]:
    groups = re.findall(r"\{([\d, ]+)\}", text)
    return [[int(n) for n in group.split(",")] for group in groups]


def _by_count(text: str) -> Sequence[Sequence[int]]:
    form = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not form:
        raise _unknown(text)
    shape, counted, order = ([int(n) for n in part.split(",")] if part else None for part in form.groups())
    assert shape and counted
    numbers = np.arange(math.prod(counted)).reshape(counted)
    return numbers.transpose(order or range(len(counted))).reshape(shape).tolist()


def _by_axes(text: str) -> Sequence[Sequence[int]]:
    form = re.fullmatch(r"mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if not form:
        raise _unknown(text)
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", form[1])}
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([\w.\-]+)'(?::\((\d+)\)(\d+))?", form[2])
    }
    shape, met, apart = [], [], []
    for name, size in sizes.items():
        before, inside = chosen.get(name, (size, 1))
        apart += [len(shape), len(shape) + 2]
        met.append(len(shape) + 1)
        shape += [before, inside, size // (before * inside)]
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose(*apart, *met)
    return numbers.reshape(-1, math.prod(shape[axis] for axis in met)).tolist()


def _span(groups: Sequence[Sequence[int]], mesh: Sizes) -> Span:
    sizes = [size for _, size in mesh]
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        differ |= np.any(places != places[:, :1], axis=1)
    axes = tuple(name for (name, _), here in zip(mesh, differ, strict=True) if here)
    return Span(axes, max(map(len, groups), default=1))


def _unknown(text: str) -> ValueError:
    return ValueError(
        f"Groups of devices are written {text[:80]!r}, which is none of the forms that "
        "`tools.planning.groups` names: add this one there."
    )
