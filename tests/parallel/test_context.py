"""Sequences in parts on the devices of the expert axis: the same losses and gradients as with whole ones."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import mesh, ops
from dsv3_jax.config import Config, Yarn
from dsv3_jax.model.model import Model
from dsv3_jax.ops.context import OVER_EXPERTS, WHOLE
from dsv3_jax.ops.fp8 import Weight, attend
from dsv3_jax.pipeline import execute, objective
from experiments.run import Mesh, Run, Train
from pallas_kernels import quantize
from tests.conftest import mesh_of
from tests.parallel.test_pipeline import gradients


@pytest.fixture(scope="module")
def deep(c):
    """Two depths of MTP, which look across the parts; YaRN, whose frequencies need the right positions."""
    return dataclasses.replace(c, yarn=Yarn(original_length=8, factor=4.0), max_length=32)


@pytest.fixture(scope="module")
def whole(deep):
    return gradients(deep, "1f1b", (1, 1), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "shape", "microbatches"),
    [
        ("1f1b", (2, 2), 2),  # data, expert, pipeline
        ("dualpipe", (1, 4, 2), 4),
    ],
)
def test_losses_and_every_gradient_are_those_of_whole_sequences(deep, whole, schedule, shape, microbatches):
    got = gradients(deep, schedule, shape, microbatches, context=OVER_EXPERTS)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(got.parts, whole.parts, rtol=1e-6)
    np.testing.assert_array_equal(got.load, whole.load)
    for (path, g), want in zip(
        jax.tree_util.tree_leaves_with_path(got.grads), jax.tree.leaves(whole.grads), strict=True
    ):
        assert np.linalg.norm(want) > 0, path
        assert np.linalg.norm(g - want) < 1e-5 * np.linalg.norm(want), jax.tree_util.keystr(path)


def test_fp8_attention_of_parts_is_that_of_whole_sequences():
    """Rows of tokens are quantised, and attention is the same: so is all but a weight's gradient."""
    shape, keys = (2, 16, 4, 32), jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    w, segments = jax.random.normal(keys[4], (128, 128)), jnp.asarray([[1] * 16, [1] * 5 + [2] * 9 + [0] * 2])

    def attended(context, devices):
        def device(*arrays):
            *heads, g, segments, w = mesh.vary(arrays)

            def project(w, *heads):
                weight = Weight(w, quantize.quantize(jax.lax.stop_gradient(w), (128, 128)))
                heads = map(context.by_heads, heads)
                return attend(*heads, 0.2, context.whole(segments), weight, context)

            y, pull = jax.vjp(project, w, *heads)
            dw, *gradients = pull(g.reshape(*g.shape[:2], -1))
            return jax.lax.psum(dw, mesh.AXES), [y, *gradients]

        parts, everywhere = jax.P(None, mesh.AXES), jax.P()
        with jax.set_mesh(mesh_of(1, devices)):
            arrays = [jax.device_put(x, parts) for x in (q, k, v, g, segments)]
            run = jax.jit(execute.on_each_device(device, (everywhere, [parts] * 4)))
            return [
                np.asarray(x, np.float32)
                for x in jax.tree.leaves(run(*arrays, jax.device_put(w, everywhere)))
            ]

    (dw, *got), (dw_whole, *want) = attended(OVER_EXPERTS, 2), attended(WHOLE, 1)
    for mine, whole in zip(got, want, strict=True):
        assert np.abs(whole).max() > 0.1
        np.testing.assert_allclose(mine, whole, rtol=1e-2, atol=1e-3)  # BF16 sums in another order
    # Scales along tokens are those of 128 of a device, which here are others.
    assert 0 < np.linalg.norm(dw - dw_whole) < 0.05 * np.linalg.norm(dw_whole)


@pytest.mark.slow
def test_scores_are_those_of_whole_sequences(deep):
    tokens = np.random.default_rng(0).integers(0, deep.vocab, (1, 2, 17)).astype(np.int32)

    def scores(shape, operations):
        with jax.set_mesh(mesh_of(*shape)):
            model = jax.jit(lambda key: Model.init(key, deep, 0.05))(jax.random.key(0))
            layout = objective.batch_spec(operations.context)
            batch = objective.Batch(*(jax.device_put(x, layout) for x in (tokens, np.ones_like(tokens))))
            bias = jax.device_put(np.zeros((deep.balanced_layers, deep.experts), np.float32), jax.P())
            run = jax.jit(lambda *a: execute.score(*a, deep, operations).logprobs)
            return np.asarray(run(model, bias, batch))

    want = scores((1, 1), ops.float32())
    np.testing.assert_allclose(scores((2, 4), ops.float32(context=OVER_EXPERTS)), want, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=8)
@given(
    parts=st.sampled_from([1, 2, 4]), positions=st.integers(1, 4), more=st.integers(1, 3), past=st.integers()
)
def test_parts_of_a_sequence_are_its_positions_in_order_and_some_more(parts, positions, more, past):
    past %= 100
    tokens = np.arange(2 * (parts * positions + 1), dtype=np.int32).reshape(2, -1)
    with jax.set_mesh(mesh_of(1, parts)):
        one = lambda x: OVER_EXPERTS.mine(x, more, past)[None]  # noqa: E731
        got = np.asarray(execute.on_each_device(one, jax.P(mesh.EXPERT))(jax.device_put(tokens, jax.P())))
    padded = np.pad(tokens, ((0, 0), (0, more - 1)), constant_values=past)
    for part, mine in enumerate(got):
        np.testing.assert_array_equal(mine, padded[:, part * positions :][:, : positions + more])


def test_what_a_context_cannot_split_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="context=2 is neither 1 nor config.mesh.expert=4"):
        Run(mesh=Mesh(expert=4, context=2))
    with pytest.raises(ValueError, match=re.escape("heads=12 do not divide over config.mesh.context=8")):
        Run(mesh=Mesh(expert=8, context=8), model=Config(heads=12))
    with pytest.raises(ValueError, match="sequence_length=100 does not divide over config.mesh.context=8"):
        Run(mesh=Mesh(expert=8, context=8), train=Train(sequence_length=100))


def test_devices_that_share_a_sequence_need_no_sequence_each():
    run = Run(mesh=Mesh(data=2, expert=8, context=8), train=Train(batch_size=2))
    assert run.batch_multiple == 2
    with pytest.raises(ValueError, match="batch_size=2 does not divide over .* choose a multiple of 16"):
        Run(mesh=Mesh(data=2, expert=8), train=Train(batch_size=2))
