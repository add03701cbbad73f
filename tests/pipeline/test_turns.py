"""Exchanges of two computations take turns, and change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax.mesh import AXES, EXPERT
from dsv3_jax.ops.exchange import Apart, direct
from dsv3_jax.pipeline import stops as stops_module
from dsv3_jax.pipeline.cut import cut
from dsv3_jax.pipeline.turns import begin, in_turns, turns
from pallas_kernels.all_to_all import Rows
from tests.conftest import mesh_of
from tests.kernels import harness
from tools.planning import hlo

few = st.integers(0, 5)


def test_the_order_is_that_of_the_trace():
    assert turns(2, 2) == [1, 0, 1, 0]


def test_a_backward_that_sends_tokens_again_does_so_before_its_gradients():
    assert turns(2, 3) == [1, 1, 0, 1, 0]


@settings(deadline=None, max_examples=50)
@given(few, few)
def test_every_exchange_has_its_turn(forward, backward):
    order = turns(forward, backward)
    assert (order.count(0), order.count(1)) == (forward, backward)


def swap(x):
    return jax.lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def computation(w, x):
    """Work, a small exchange that takes no turn, a large one, work, a large one back, work."""
    small = swap(x[:, :1])
    y = swap(jnp.sin(x @ w))
    return swap(jnp.cos(y @ w)) * 2 + small, jax.lax.psum(jnp.max(y), EXPERT)


def both(w, x, y):
    (phase,) = cut(lambda w, x: (computation(w, *x),), w, (x,))
    order = turns(phase.stops, phase.stops)

    def steps(x):
        (x,) = yield from begin(x)
        return (yield from phase.steps(w, [], x))

    (first, _), (second, _) = in_turns(order, steps(x), steps(y))
    return first, second


def operands():
    key = jax.random.key(0)
    return [jax.random.normal(jax.random.fold_in(key, n), (8, 8)) for n in range(3)]


def test_results_are_those_of_each_alone():
    def device(w, x, y):
        w, x, y = jax.lax.pcast((w, x, y), EXPERT, to="varying")
        together, apart = both(w, x, y), (computation(w, x), computation(w, y))
        return jax.tree.map(lambda a, b: jax.lax.pmax(jnp.max(jnp.abs(a - b)), EXPERT), together, apart)

    with jax.set_mesh(mesh_of(1, 2)):
        differences = jax.jit(jax.shard_map(device, axis_names={EXPERT}, in_specs=P(), out_specs=P()))(
            *operands()
        )
    assert not np.any(jax.tree.leaves(differences))


def test_a_large_exchange_waits_for_the_turn_before():
    jaxpr = jax.make_jaxpr(both, axis_env=[(EXPERT, 2)])(*operands()).jaxpr
    needs, done = {}, 0
    for equation in jaxpr.eqns:
        before = set().union(*(needs.get(v, set()) for v in equation.invars if not hasattr(v, "val")))
        if equation.primitive.name == "all_to_all" and equation.invars[0].aval.size > 8:
            assert set(range(done)) <= before, f"turn {done} does not wait: {equation}"
            before |= {done}
            done += 1
        needs |= dict.fromkeys(equation.outvars, before)
    assert done == 4


def independent(w, x):
    """Two large exchanges that do not wait for each other, though one is written after the other."""
    y = swap(jnp.sin(x @ w))
    z = swap(jnp.cos(x @ w))
    return swap(y * z)


def test_exchanges_that_do_not_wait_for_each_other_are_one_stop():
    program = lambda w, x: (independent(w, *x),)  # noqa: E731
    with jax.set_mesh(mesh_of(1, 2)):
        stops = []

        def device(w, x):
            w, x = jax.lax.pcast((w, x), EXPERT, to="varying")
            (phase,) = cut(program, w, (x,))
            stops.append(phase.stops)
            (y, _), want = phase.run(w, [], x), independent(w, x)
            return jax.lax.pmax(jnp.max(jnp.abs(y - want)), EXPERT)

        f = jax.shard_map(device, axis_names={EXPERT}, in_specs=P(), out_specs=P())
        assert jax.jit(f)(*operands()[:2]) == 0
    assert stops == [2]


def exchanged(w, x, counts):
    """A product, a kernel's exchange, a product."""
    rows = Rows(counts, counts)
    return direct(direct(jnp.tanh(x @ w), rows) @ w, rows)


def exchanged_together(w, x, counts):
    """Two products, a kernel's exchange of each, a product."""
    rows = Rows(counts, counts)
    first, second = (direct(f(x @ w), rows) for f in (jnp.tanh, jnp.sin))
    return direct((first * second) @ w, rows)


@pytest.mark.parametrize("exchanged", [exchanged, exchanged_together])
def test_halves_give_what_the_whole_gives(exchanged, monkeypatch):
    """With halves of which the second does all: kernels that have two cannot be interpreted."""

    def apart(places, types):
        def start(*given):
            return [given[x] for x, *_ in places]

        def done(begun, *given):
            every = zip(begun, places, strict=True)
            return [direct(x, Rows(*(given[n] for n in rows))) for x, (_, *rows) in every]

        return Apart(start, lambda *both: jax.lax.optimization_barrier(both), done)

    monkeypatch.setattr(stops_module, "apart", apart)

    def device(w, x, y, counts):
        w, x, y, counts = jax.lax.pcast((w, x, y, counts), EXPERT, to="varying")
        (phase,) = cut(lambda counts, given: (exchanged(*given, counts),), counts, (w, x))

        def steps(x):
            (x,) = yield from begin(x)
            return (yield from phase.steps(counts, [], w, x))

        (first, _), (second, _) = in_turns(turns(2, 2), steps(x), steps(y))
        off = first - exchanged(w, x, counts), second - exchanged(w, y, counts)
        return jax.lax.pmax(jnp.max(jnp.abs(jnp.stack(off))), EXPERT)

    w, *given = operands()
    counts = jnp.array([3, 4], jnp.int32)
    with jax.set_mesh(mesh_of(1, 2)):
        f = jax.shard_map(device, axis_names={EXPERT}, in_specs=P(), out_specs=P())
        assert jax.jit(f)(w, *(x.reshape(2, 4, 8) for x in given), counts) < 1e-5


@harness.needs_libtpu
@pytest.mark.parametrize(
    ("backward", "began"),
    [
        (exchanged, ["product", "start", "product", "done"]),
        # Of what leaves together, the first is on its way while the second is made.
        (exchanged_together, ["product", "start", "product", "start", "product", "done", "done"]),
    ],
)
def test_barriers_hold_the_work_between_the_halves_of_kernels(backward, began):
    """Of two exchanges of each of two computations: between begin and end of each, a product of the other."""
    mesh = jax.sharding.Mesh(
        np.array(harness.absent("v5p")).reshape(1, 1, -1),
        AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * 3,
    )

    def device(w, x, y, counts):
        def steps(exchanged, x):
            (phase,) = cut(lambda counts, given: (exchanged(*given, counts),), counts, (w, x))
            assert phase.stops == 2
            (x,) = yield from begin(x)
            return (yield from phase.steps(counts, [], w, x))

        return [result[0] for result in in_turns(turns(2, 2), steps(exchanged, x), steps(backward, y))]

    whole = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
        sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, P(EXPERT))
    )
    n = mesh.size
    sizes = whole(n * 512, 512), whole(n * n, 128, 512), whole(n * n, 128, 512), whole(n * n, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.shard_map(device, out_specs=P(EXPERT))).lower(*sizes).compile()
    module = hlo.parse(program.as_text())
    marks = []
    for instruction in module.computations[module.entry].instructions.values():
        if instruction.name.startswith("expert_all_to_all"):
            marks.append(instruction.name.partition(".")[0].rpartition("_")[2])
        elif "dot_general" in instruction.op_name and instruction.opcode in ("fusion", "convolution"):
            marks.append("product")
    assert marks == [*began, *["start", "product", "done"] * 2, "start", "done"]
