"""Every mesh computes the same training run, and so does every split into micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ops
from dsv3_jax.ops import recompute
from dsv3_jax.ops.dispatch import AllToAll
from dsv3_jax.pipeline import objective
from dsv3_jax.training import step
from dsv3_jax.training.recipe import Recipe
from tests.conftest import mesh_of

STEPS = 20
RECIPE = Recipe(learning_rate=1e-3, warmup_steps=5, batch_ramp_tokens=0)


def batches(vocab):
    """Arithmetic progressions, so that there is something to learn; some rows end in padding."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = (rng.integers(0, vocab, (8, 1)) + np.arange(17) * rng.integers(1, 4, (8, 1))) % vocab
        segments = np.where(np.arange(17)[None] < rng.integers(9, 25, (8, 1)), 1, 0)
        yield tokens.astype(np.int32), segments.astype(np.int32)


def run(c, shape, microbatches=1, remat=recompute.nothing, precision=ops.float32, hosts=1):
    """Losses, gradient norms and the final bias of a short run."""
    operations = precision(remat, dispatcher=AllToAll(hosts=hosts))
    setup = step.Setup(c, operations, RECIPE, jnp.dtype(jnp.float32))
    with jax.set_mesh(mesh_of(*shape)):
        state = jax.jit(lambda k: step.State.init(k, setup))(jax.random.key(0))
        history = []
        for rows in batches(c.vocab):
            split = (x.reshape(microbatches, -1, x.shape[-1]) for x in rows)
            batch = objective.Batch(*(jax.device_put(x, objective.batch_spec()) for x in split))
            state, m = step.step(state, batch, setup=setup)
            history.append([m.loss, m.main_loss, m.mtp_loss, m.balance_loss, m.grad_norm])
        return np.array(history, np.float64), np.asarray(state.bias)


@pytest.fixture(scope="module")
def alone(c):
    return run(c, (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "microbatches", "hosts"),
    [((2, 1), 1, 1), ((4, 1), 1, 1), ((1, 4), 1, 1), ((2, 4), 1, 2), ((2, 2, 2), 2, 1)],
)
def test_every_mesh_computes_the_same_training_run(c, shape, microbatches, hosts, alone):
    history, bias = run(c, shape, microbatches, hosts=hosts)
    np.testing.assert_allclose(history[:, :4], alone[0][:, :4], rtol=1e-5)  # FP32 sums in another order
    np.testing.assert_allclose(history[:, 4], alone[0][:, 4], rtol=1e-3)
    np.testing.assert_array_equal(bias, alone[1])  # signs of counts: exact
    assert alone[0][-1, 0] < alone[0][0, 0] - 0.1  # the run learns, so the comparison means something
    assert len(np.unique(alone[1])) > 3


@pytest.mark.slow
def test_micro_batches_compute_the_same_training_run(c, alone):
    history, bias = run(c, (2, 1), microbatches=4)
    np.testing.assert_allclose(history[:, :4], alone[0][:, :4], rtol=1e-5)
    np.testing.assert_array_equal(bias, alone[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat", [recompute.norms_and_up_projections, recompute.experts, recompute.everything]
)
def test_recomputation_changes_nothing(c, remat, alone):
    history, bias = run(c, (1, 1), remat=remat)
    np.testing.assert_allclose(history[:, :4], alone[0][:, :4], rtol=1e-5)
    np.testing.assert_array_equal(bias, alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("precision", [ops.bfloat16, ops.fp8])
def test_lower_precision_tracks_float32_on_a_mesh(c, alone, precision):
    history, _ = run(c, (2, 2), remat=recompute.norms_and_up_projections, precision=precision)
    np.testing.assert_allclose(history[:, 1], alone[0][:, 1], rtol=5e-3)  # products of 8 bits, sums in FP32
    assert np.abs(history[:, 1] - alone[0][:, 1]).max() > 1e-6  # and it is not FP32 after all
