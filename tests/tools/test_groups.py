"""Groups of devices are read alike however XLA writes them, and span the axes that they differ in."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.planning.groups import Span, crossed, expand, spanned

NAMES = ("pipeline", "data", "expert", "fourth")
MESH = (("pipeline", 2), ("data", 2), ("expert", 4))


@st.composite
def meshes(draw):
    """A mesh, and some of its axes."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    mesh = tuple(zip(NAMES, sizes, strict=False))
    return mesh, tuple(name for name, _ in mesh if draw(st.booleans()))


def met(mesh, axes):
    """Sets of devices whose places differ in these axes alone, place by place."""
    places = itertools.product(*(range(size) for _, size in mesh))
    groups = {}
    for device, place in enumerate(places):
        apart = tuple(n for n, (name, _) in zip(place, mesh, strict=True) if name not in axes)
        groups.setdefault(apart, []).append(device)
    return list(groups.values())


def explicit(groups):
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def counted(mesh, axes):
    """The rows of a transposed count, axes that do not meet first."""
    sizes = [size for _, size in mesh]
    apart = [n for n, (name, _) in enumerate(mesh) if name not in axes]
    order = [*apart, *(n for n in range(len(mesh)) if n not in apart)]
    devices = math.prod(size for name, size in mesh if name in axes)
    rows = f"[{math.prod(sizes) // devices},{devices}]<=[{','.join(map(str, sizes))}]"
    return rows if order == sorted(order) else f"{rows}T({','.join(map(str, order))})"


def by_axes(mesh, axes):
    sizes = ",".join(f"'{name}'={size}" for name, size in mesh)
    return f"mesh[{sizes}] {{{','.join(repr(axis) for axis in axes)}}}"


def as_sets(groups):
    return {frozenset(group) for group in groups}


@settings(deadline=None)
@given(meshes())
def test_the_three_ways_of_writing_say_the_same(drawn):
    mesh, axes = drawn
    devices, groups = math.prod(size for _, size in mesh), met(mesh, axes)
    wanted = Span(tuple(name for name, size in mesh if name in axes and size > 1), len(groups[0]))
    for text in (explicit(groups), counted(mesh, axes), by_axes(mesh, axes)):
        assert as_sets(expand(text, devices)) == as_sets(groups), text
        assert spanned(text, mesh) == wanted, text


@settings(deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2))
def test_a_transposed_count_is_numbered_as_it_is_written(order, sizes, last):
    """Numbers are found by their place, without transposing anything."""
    width = math.prod(sizes[axis] for axis in order[last:])
    text = (
        f"[{math.prod(sizes) // width},{width}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, order))})"
    )
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(3)]
    places = itertools.product(*(range(sizes[axis]) for axis in order))
    numbers = [sum(strides[axis] * n for axis, n in zip(order, place, strict=True)) for place in places]
    assert list(itertools.chain(*expand(text, math.prod(sizes)))) == numbers


def test_a_part_of_an_axis_meets_within_its_axis():
    text = "mesh['a'=2,'b'=8] {'b':(2)2}"  # of the places 2 x 2 x 2 of b, the middle one
    assert as_sets(expand(text, 16)) == as_sets([[n, n + 2] for n in (0, 1, 4, 5, 8, 9, 12, 13)])
    assert spanned(text, (("a", 2), ("b", 8))) == Span(("b",), 2)


def test_no_groups_are_one_of_all():
    assert spanned("{}", MESH) == Span(("pipeline", "data", "expert"), 16)


def test_a_mesh_of_other_names_is_read_by_position():
    assert spanned("mesh['x'=4,'y'=4] {'y'}", MESH) == Span(("expert",), 4)


def test_pairs_cross_the_axes_in_which_they_differ():
    ring = [(n, (n + 8) % 16) for n in range(16)]
    assert crossed(explicit(ring), MESH).axes == ("pipeline",)
    assert crossed(explicit([(0, 1), (1, 2)]), MESH).axes == ("expert",)
    assert crossed(explicit([(3, 4)]), MESH).axes == ("data", "expert")
    assert crossed(explicit([(n, n) for n in range(16)]), MESH).axes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{0,16}}", "names device 16 but the mesh has 16"),
        ("[8,4]<=[32]", "names device 31 but the mesh has 16"),
        ("mesh['a'=2] ids {'a'}", "none of the forms"),
        ("[2,2]<=2", "none of the forms"),
        ("all", "none of the forms"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        expand(text, np.prod([size for _, size in MESH]))
