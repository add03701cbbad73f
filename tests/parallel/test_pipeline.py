"""A pipelined step gives the losses and every gradient of the model that is not cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import ops
from dsv3_jax.config import Config
from dsv3_jax.model.model import Model
from dsv3_jax.ops import recompute
from dsv3_jax.ops.context import WHOLE
from dsv3_jax.pipeline import execute, objective
from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.placement import placement, share_out
from dsv3_jax.pipeline.slots import jobs
from dsv3_jax.pipeline.table import table
from tests.conftest import mesh_of

ROWS, LENGTH = 16, 16


@pytest.fixture(scope="module")
def deep(c):
    """Seven routed layers, which no number of ranks here divides, beside a dense one and MTP."""
    return dataclasses.replace(c, layers=8, mtp_depth=1)


def gradients(c, schedule, shape, microbatches, precision=ops.float32, context=WHOLE):
    """What a step minimises by, of rows that partly end in padding, on a mesh (data, expert, pipeline)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, c.vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = (np.arange(LENGTH + 1)[None] < rng.integers(LENGTH // 2, 2 * LENGTH, (ROWS, 1))).astype(
        np.int32
    )
    bias = 0.01 * rng.normal(size=(c.balanced_layers, c.experts)).astype(np.float32)
    weights = objective.Weights(jnp.float32(0.3), jnp.float32(1e-2))
    make = SCHEDULES[schedule].make
    operations = precision(recompute.norms_and_up_projections, context=context)
    with jax.set_mesh(mesh_of(*shape)):
        # Weights large enough for every layer to matter.
        model = jax.jit(lambda key: Model.init(key, c, 0.05))(jax.random.key(0))
        split = (x.reshape(microbatches, -1, LENGTH + 1) for x in (tokens, segments))
        batch = objective.Batch(*(jax.device_put(x, objective.batch_spec(context)) for x in split))
        run = jax.jit(lambda *a: execute.value_and_grad(*a, weights, c, operations, make))
        return jax.tree.map(np.asarray, run(model, jax.device_put(bias, jax.P()), batch))


@pytest.fixture(scope="module")
def whole(deep):
    return gradients(deep, "1f1b", (1, 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "shape", "microbatches"),
    [
        ("gpipe", (1, 1, 8), 2),  # fewer micro-batches than ranks
        ("1f1b", (1, 2, 4), 8),
        ("zb1p", (2, 2, 2), 4),
        ("dualpipe", (2, 2, 2), 4),
        ("dualpipe", (1, 1, 8), 16),
        ("dualpipev", (1, 2, 4), 8),  # 8 stages: some have no routed layer
    ],
)
def test_losses_and_every_gradient_are_those_of_the_whole_model(deep, whole, schedule, shape, microbatches):
    got = gradients(deep, schedule, shape, microbatches)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(got.parts, whole.parts, rtol=1e-6)
    np.testing.assert_array_equal(got.load, whole.load)
    for (path, g), want in zip(
        jax.tree_util.tree_leaves_with_path(got.grads), jax.tree.leaves(whole.grads), strict=True
    ):
        assert np.abs(want).max() > 0, path
        assert np.linalg.norm(g - want) < 1e-5 * np.linalg.norm(want), jax.tree_util.keystr(path)
        assert np.abs(g - want).max() < 1e-5 * np.abs(want).max(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_fp8_is_as_near_to_float32_with_a_pipeline_as_without(deep, whole):
    """Rounding moves tokens between experts, so that two programs of the same products differ by as much."""

    def error(result):
        pairs = zip(jax.tree.leaves(result.grads), jax.tree.leaves(whole.grads), strict=True)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    alone = error(gradients(deep, "gpipe", (1, 1), 4, ops.fp8))
    piped = error(gradients(deep, "gpipe", (1, 1, 2), 4, ops.fp8))
    assert alone.mean() > 1e-3  # it is not FP32 after all
    assert piped.mean() < 1.5 * alone.mean()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loops_turn_once_for_each_layer_and_micro_batch_and_no_more(deep, schedule, ranks):
    chosen = SCHEDULES[schedule].make(ranks, 2 * ranks)
    where = placement(chosen, deep)
    work = jobs(table(chosen)[0], chosen, where)
    turns = deep.routed_layers * chosen.microbatches
    assert work.forward.layers.sum() == turns
    assert work.backward.layers.sum() + work.inputs.layers.sum() == turns
    assert work.weights.layers.sum() == work.inputs.layers.sum()
    assert work.forward.entry.sum() == work.backward.entry.sum() + work.inputs.entry.sum() == 2 * ranks
    assert work.backward.exit.sum() + work.inputs.exit.sum() == 2 * ranks


@settings(deadline=None, max_examples=30)
@given(
    routed=st.integers(1, 70),
    dense=st.integers(0, 4),
    depth=st.integers(0, 2),
    ranks=st.sampled_from([2, 4, 6, 16]),
    schedule=st.sampled_from(list(SCHEDULES)),
)
def test_every_layer_has_a_place_for_each_direction(c, routed, dense, depth, ranks, schedule):
    sizes = dataclasses.replace(c, layers=dense + routed, dense_layers=dense, mtp_depth=depth)
    chosen = SCHEDULES[schedule].make(ranks, 2 * ranks)
    where = placement(chosen, sizes)
    used = np.concatenate([
        where.layers[rank, : where.counts[rank].sum()] for rank in range(ranks)
    ])  # fmt: skip
    np.testing.assert_array_equal(np.sort(used), np.repeat(np.arange(routed), len(chosen.paths)))


def test_deepseek_v3_over_sixteen_stages_leaves_its_ends_room():
    shares = share_out(Config(), 16)
    assert sum(shares) == 58
    assert max(shares) <= 5
    assert shares[0] <= 1 and shares[-1] <= 1  # beside dense layers, and heads with MTP


def test_a_model_without_routed_layers_has_no_stages(c):
    with pytest.raises(ValueError, match="no routed layers"):
        placement(SCHEDULES["1f1b"].make(2, 2), dataclasses.replace(c, dense_layers=3))
