"""A step is AdamW on the gradient of the loss, or nothing at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax import ops
from dsv3_jax.pipeline import execute, objective
from dsv3_jax.training import optim, step
from dsv3_jax.training.recipe import Recipe

RECIPE = Recipe(learning_rate=1e-2, warmup_steps=1, batch_ramp_tokens=0, ema_decay=0.9)


@pytest.fixture(scope="module")
def begun(c, one_device):
    """A state, a batch and their setup, on one device."""
    setup = step.Setup(c, ops.float32(), RECIPE, jnp.dtype(jnp.float32))
    tokens = np.random.default_rng(0).integers(0, c.vocab, (1, 4, 17), dtype=np.int32)
    with jax.set_mesh(one_device):
        state = jax.jit(lambda k: step.State.init(k, setup))(jax.random.key(0))
        batch = objective.Batch(
            *(jax.device_put(x, objective.batch_spec()) for x in (tokens, tokens * 0 + 1))
        )
        yield setup, state, batch


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("std", [0.006, 0.05])
def test_fresh_matrices_have_the_recipes_deviation_and_norms_gains_of_one(c, one_device, std):
    setup = step.Setup(c, ops.float32(), Recipe(init_std=std), jnp.dtype(jnp.float32))
    with jax.set_mesh(one_device):
        model = jax.jit(lambda k: step.State.init(k, setup))(jax.random.key(0)).model
    seen = []
    for path, w in jax.tree_util.tree_leaves_with_path(model):
        if jax.tree_util.keystr(path).endswith("norm"):
            assert np.all(w == 1)
            continue
        seen.append(np.ravel(w))
        error = 5 / np.sqrt(2 * w.size)  # five standard errors of a deviation
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(w))), std, rtol=error, err_msg=str(path))
    drawn = np.concatenate(seen)
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # no two layers from one key


@pytest.mark.slow
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(begun, poison):
    setup, state, batch = begun
    broken = state.replace(model=state.model.replace(norm=state.model.norm.at[0].set(poison)))
    before = jax.tree.map(np.asarray, broken)
    after, metrics = step.step(copied(broken), batch, setup=setup)
    for part in ("model", "bias", "optimizer", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (1, 1, 1)
    assert int(metrics.sequences) == 4
    mended = after.replace(model=state.model)
    good, _ = step.step(copied(mended), batch, setup=setup)
    assert (int(good.skipped), int(good.skipped_in_a_row)) == (1, 0)
    assert np.abs(np.asarray(good.model.embed) - np.asarray(state.model.embed)).max() > 0
    average = 0.9 * np.asarray(state.average.norm) + 0.1 * np.asarray(good.model.norm)
    np.testing.assert_allclose(good.average.norm, average, rtol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences(begun):
    setup, state, batch = begun
    weights = objective.Weights(jnp.float32(0.3), jnp.float32(1e-2))
    run = jax.jit(
        lambda m: execute.value_and_grad(m, state.bias, batch, weights, setup.c, setup.ops, setup.schedule)
    )
    keys = iter(jax.random.split(jax.random.key(1), 200))
    draw = lambda w: 0.05 * jax.random.normal(next(keys), w.shape, out_sharding=jax.typeof(w).sharding)  # noqa: E731
    # Away from the tiny initial weights, where the loss is too flat for differences in FP32.
    model = jax.tree.map(lambda w: w + draw(w), state.model)
    result = run(model)
    parts = result.parts
    total = parts.main + 0.3 * parts.mtp + 1e-2 * parts.balance
    np.testing.assert_allclose(result.loss, total, rtol=1e-6)
    slope = float(optax.tree.norm(result.grads))  # along the gradient itself, where it is steepest
    moved = lambda h: run(jax.tree.map(lambda w, g: w + h / slope * g, model, result.grads)).loss  # noqa: E731
    # A choice of experts that flips between the two ends bends the line, so several lengths are tried.
    slopes = [float((moved(h) - moved(-h)) / (2 * h)) for h in (1e-4, 3e-4, 1e-3)]
    assert min(abs(s / slope - 1) for s in slopes) < 1e-2, (slopes, slope)


def test_adam_with_float32_moments_is_that_of_optax():
    params = {"w": jnp.ones((3, 4)), "norm": jnp.ones(4)}
    ours = optim.adamw(RECIPE, jnp.dtype(jnp.float32))
    theirs = optax.chain(
        optax.scale_by_adam(0.9, 0.95, 1e-8), optax.add_decayed_weights(0.1, mask={"w": True, "norm": False})
    )
    states = ours.init(params), theirs.init(params)
    for seed in range(4):
        grads = jax.tree.map(lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape), params)
        (a, first), (b, second) = (
            ours.update(grads, states[0], params),
            theirs.update(grads, states[1], params),
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
        states = first, second


def test_bfloat16_moments_are_stored_narrow_and_computed_wide():
    params = {"w": jnp.ones((64, 64))}
    narrow = optim.scale_by_adam(0.9, 0.95, 1e-8, jnp.dtype(jnp.bfloat16))
    wide = optim.scale_by_adam(0.9, 0.95, 1e-8, jnp.dtype(jnp.float32))
    a, b = narrow.init(params), wide.init(params)
    for seed in range(3):
        grads = {"w": jax.random.normal(jax.random.key(seed), (64, 64))}
        (x, a), (y, b) = narrow.update(grads, a, params), wide.update(grads, b, params)
    assert a.mu["w"].dtype == a.nu["w"].dtype == jnp.bfloat16
    # Each stored moment is off by at most 2^-9 of itself a step.
    assert float(jnp.sqrt(jnp.mean((x["w"] - y["w"]) ** 2))) < 1e-2
    assert float(jnp.abs(x["w"] - y["w"]).max()) > 0
