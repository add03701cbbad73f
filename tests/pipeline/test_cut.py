"""A program in phases gives what the whole gives, and hands on no more than later phases need."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import mesh, ops
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.block import RoutedBlock
from dsv3_jax.model.layers import Draw
from dsv3_jax.ops import recompute
from dsv3_jax.pipeline.cut import cut
from tests.conftest import mesh_of


def layer(w, x):
    """What is kept of the forward is `hidden`; its activation is computed again."""
    hidden = checkpoint_name(x @ jnp.tanh(w["up"]), "hidden")
    return x + jax.nn.silu(hidden) @ w["down"], jnp.sum(hidden)


def training(layer):
    """A layer's forward, gradient of inputs and gradient of weights, as the phases of one program."""

    def program(w, x, g, _):
        y, pull, total = jax.vjp(layer, w, *x, has_aux=True)
        dw, dx = pull(*g)
        return (y, total), dx, dw

    return program


def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    w = {"up": jax.random.normal(keys[0], (8, 16)), "down": jax.random.normal(keys[1], (16, 8))}
    return w, jax.random.normal(keys[2], (4, 8)), jax.random.normal(keys[3], (4, 8))


REMAT = {
    "nothing": lambda f: f,
    "hidden": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("hidden")),
    "everything": jax.checkpoint,
}


def run(phases, w, *inputs):
    handed, outputs = [], []
    for phase, given in zip(phases, inputs, strict=True):
        output, handed = phase.run(w, handed, *given)
        outputs.append(output)
    assert handed == []
    return tuple(outputs)


@pytest.mark.parametrize("remat", REMAT)
def test_phases_give_what_the_whole_program_gives(remat):
    w, x, g = operands()
    program = training(REMAT[remat](layer))
    phases = cut(program, w, (x,), (g,), ())
    whole = jax.jit(program)(w, (x,), (g,), ())
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # noqa: E731
    jax.tree.map(close, run(phases, w, (x,), (g,), ()), whole)


def test_a_backward_gets_what_is_kept_in_fewer_bytes_and_not_what_that_is_made_of():
    """A cotangent rule that keeps 8 bits of an activation, as FP8 recipes do."""

    @jax.custom_vjp
    def activation(x):
        return jnp.tanh(x)

    def forward(x):
        return jnp.tanh(x), checkpoint_name((8 * x).astype(jnp.int8), "packed")

    activation.defvjp(forward, lambda kept, g: (g * kept,))
    w, x, g = operands()
    for remat in (
        lambda f: f,
        lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("packed")),
    ):
        program = training(remat(lambda w, x: (activation(x @ w["up"]) @ jnp.ones((16, 8)), jnp.sum(x))))
        forward_phase, *others = cut(program, w, (x,), (g,), ())
        kept = {(a.dtype.name, a.shape) for a in forward_phase.hands_on}
        assert ("int8", (4, 16)) in kept and ("float32", (4, 16)) not in kept
        whole = jax.jit(program)(w, (x,), (g,), ())
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # noqa: E731
        jax.tree.map(close, run([forward_phase, *others], w, (x,), (g,), ()), whole)


@pytest.mark.parametrize(
    ("remat", "kept"),
    [("hidden", {(4, 8), (4, 16)}), ("everything", {(4, 8)})],
)
def test_a_backward_gets_what_its_checkpoint_keeps_and_no_weights(remat, kept):
    w, x, g = operands()
    forward, backward, weights = cut(training(REMAT[remat](layer)), w, (x,), (g,), ())
    assert {a.shape for a in forward.hands_on} == kept
    assert all(a.shape[0] == 4 for a in backward.hands_on)  # tokens, in rows; weights have 8 or 16
    assert not weights.hands_on


def test_what_is_computed_of_weights_alone_is_not_handed_on():
    def program(w, x, g):
        strong = jnp.exp(w)
        return x[0] * strong, g[0] * strong

    forward, backward = cut(program, 2.0, (1.0,), (1.0,))
    assert not forward.hands_on
    np.testing.assert_allclose(backward.run(2.0, [], 3.0)[0], 3 * np.exp(2.0), rtol=1e-6)


def test_what_is_narrow_is_handed_on_and_widened_again():
    def program(w, x, g):
        wide = x[0].astype(jnp.float32)
        return jnp.sum(jnp.exp(wide)) * w, g[0] * jnp.sin(wide)

    x = jnp.linspace(0, 1, 4, dtype=jnp.bfloat16)
    forward, backward = cut(program, 2.0, (x,), (1.0,))
    assert [a.dtype for a in forward.hands_on] == [jnp.bfloat16]
    np.testing.assert_array_equal(
        backward.run(2.0, forward.run(2.0, [], x)[1], 1.0)[0], jnp.sin(x.astype(jnp.float32))
    )


def test_an_input_of_a_later_phase_is_missed():
    with pytest.raises(ValueError, match="Phase 0 needs an input of phase 1"):
        cut(lambda w, x, g: (x[0] * g[0], g[0]), 1.0, (1.0,), (1.0,))


def test_constants_of_the_program_are_kept():
    table = jnp.arange(4.0)
    forward, backward = cut(lambda w, x, g: (x[0] + table, g[0] * table), 1.0, (1.0,), (1.0,))
    np.testing.assert_array_equal(forward.run(1.0, [], 1.0)[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(backward.run(1.0, [], 2.0)[0], [0, 2, 4, 6])


@pytest.mark.parametrize("precision", [ops.float32, ops.fp8])
def test_a_layer_of_the_model_is_cut_on_a_mesh(c, precision):
    operations = precision(recompute.norms_and_up_projections)
    with jax.set_mesh(mesh_of(2, 4)):
        weights = jax.jit(lambda key: RoutedBlock.init(Draw(key, 0.05), c))(jax.random.key(0))
        specs = mesh.specs(weights)
        tokens = P(mesh.TOKENS, None, None)
        draw = lambda seed: jax.random.normal(jax.random.key(seed), (8, 16, c.d_model), out_sharding=tokens)  # noqa: E731

        def device(weights, x, g):
            weights, x, g, bias = mesh.vary((weights, x, g, jnp.zeros(c.experts)))
            x, g = x.astype(operations.dtype), g.astype(operations.dtype)
            lasting = (
                operations.attach(weights, operations.prepare(weights, specs)[0]),
                bias,
                mesh.vary(jnp.ones(x.shape[:2], int)),
            )

            def program(lasting, x, g, _):
                w, bias, segments = lasting
                layer = lambda w, x: operations.gather(w, specs)(x, bias, segments, c, operations)  # noqa: E731
                (y, balance), pull = jax.vjp(operations.remat(layer), w, *x)
                counts: Any = np.zeros(balance.load.shape, jax.dtypes.float0)
                dw, dx = pull((*g, Balance(counts, mesh.vary(jnp.ones(())))))
                return (y, balance.loss), dx, [d for d in jax.tree.leaves(dw) if d.dtype == jnp.float32]

            inputs = (x,), (g,), ()
            parts, whole = run(cut(program, lasting, *inputs), lasting, *inputs), program(lasting, *inputs)
            return jax.tree.map(lambda a, b: _largest(a - b), parts, whole)

        differences = jax.tree.leaves(
            jax.jit(jax.shard_map(device, out_specs=P()))(weights, draw(1), draw(2))
        )
    assert len(differences) > 10
    assert not np.any(differences)  # the same operations on the same numbers


def _largest(x):
    return jax.lax.pmax(jnp.max(jnp.abs(x.astype(jnp.float32))), mesh.AXES)
