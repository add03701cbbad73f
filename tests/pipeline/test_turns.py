"""Exchanges of two computations take turns, and change no number."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax.mesh import EXPERT
from dsv3_jax.pipeline.cut import cut
from dsv3_jax.pipeline.turns import begin, in_turns, turns
from tests.conftest import mesh_of

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
