"""Every implementation of attention is attention, and none holds a square of scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mla_attention import (
    attention,
    backward,
    cases,
    cpu,
    forward,
    gpu,
    gpu_backward,
    reference,
    tpu,
    tuning,
)
from tests.kernels import harness
from tests.kernels.hopper_compiler import assert_fits, compile_kernels, needs_cuda_plugin


def definition(q, k, v, scale, segments):
    """Softmax over all scores at once, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhx,bkhx->bhqk", q, k) * scale
    visible = np.tri(q.shape[1], dtype=bool)[None] & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhv->bqhv", weights / weights.sum(-1, keepdims=True), v)


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, length, 3, 12)).astype(np.float32)
    v = rng.normal(size=(2, length, 3, 8)).astype(np.float32)
    segments = np.sort(rng.integers(0, 4, (2, length)), axis=1).astype(np.int32)
    return q, k, v, segments


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_values_equal_the_definition(length):
    q, k, v, segments = inputs(length)
    got = attention(q, k, v, 0.3, segments)
    np.testing.assert_allclose(
        got, definition(q, k, v, 0.3, segments), atol=2e-6
    )  # FP32 sums of <= 300 terms


def test_gradients_equal_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 16)
    q, k, v, segments = inputs(50, seed=1)
    weight = np.random.default_rng(2).normal(size=v.shape).astype(np.float32)

    def plain(q, k, v):
        scores = jnp.einsum("bqhx,bkhx->bhqk", q, k) * 0.3
        visible = jnp.tri(50, dtype=bool)[None] & (segments[:, :, None] == segments[:, None, :])
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.sum(weight * jnp.einsum("bhqk,bkhv->bqhv", weights, v))

    blockwise = lambda q, k, v: jnp.sum(weight * attention(q, k, v, 0.3, segments))  # noqa: E731
    for got, want in zip(
        jax.grad(blockwise, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_position_does_not_see_later_ones_nor_other_segments():
    q, k, v, segments = inputs(200)
    before = attention(q, k, v, 0.3, segments)
    position, row = 150, 0
    hidden = (np.arange(200) > position) | (segments[row] != segments[row, position])
    v[row, hidden] = 1e3
    k[row, hidden] = 1e3
    after = attention(q, k, v, 0.3, segments)
    np.testing.assert_array_equal(before[row, position], after[row, position])


def test_no_array_of_all_scores_exists():
    length = 2048
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, 1.0, jnp.ones((1, length), jnp.int32)))  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    assert f"{length}x{length}" not in text


def test_a_scan_over_layers_keeps_no_masks_of_all_positions():
    layers, length = 3, 512
    segments = jnp.ones((1, length), jnp.int32)

    def run(x, gains):
        layer = lambda x, gain: (attention(x * gain, x, x, 1.0, segments), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, x, gains)[0])

    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    text = jax.jit(jax.grad(run)).lower(x, jax.ShapeDtypeStruct((layers,), jnp.float32)).as_text()
    stored = [size for size in re.findall(r"tensor<([\dx]+)xi1>", text) if size.count("x") > 1]
    assert not stored, stored


def of_case(case, dtype):
    rng = np.random.default_rng(case.length)
    lengths = (*case.documents, case.length - sum(case.documents))
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].repeat(case.batch, 0).astype(np.int32)
    shapes = [
        (case.batch, case.length, case.heads, w) for w in (case.width, case.width, *[case.value_width] * 2)
    ]
    return (*(jnp.asarray(rng.normal(size=s), dtype) for s in shapes), jnp.asarray(segments))


# FP32: sums of 192 and of at most 256 terms; BF16: inputs of the second product rounded to 8 bits.
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 6e-3)])
@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL.keys())
@harness.interprets
def test_the_tpu_kernels_give_the_values_and_gradients_of_the_definition(case, dtype, bound):
    q, k, v, g, segments = of_case(case, dtype)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    want, pull = jax.vjp(lambda q, k, v: reference.forward(q, k, v, 0.07, segments), *wide[:3])
    y, log_z = tpu.forward(q, k, v, 0.07, segments, interpret=harness.on_tpu())
    assert harness.relative_error(y, want[0]) < bound
    np.testing.assert_allclose(log_z, want[1], rtol=1e-5, atol=1e-5)
    gradients = tpu.backward(q, k, v, 0.07, segments, y, log_z, g, interpret=harness.on_tpu())
    for got, exact in zip(gradients, pull((wide[3], jnp.zeros_like(want[1]))), strict=True):
        # Where every query sees itself alone, gradients of queries and keys are zero but for rounding.
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error < bound * np.linalg.norm(exact) + 1e-4


WHOLE_BLOCKS = ["one document", "documents across blocks", "documents of one token"]


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
@harness.interprets
def test_the_hopper_kernel_gives_the_values_of_the_definition(name):
    q, k, v, _, segments = of_case(cases.SMALL[name], jnp.bfloat16)
    assert gpu.serves(q, v)
    y, log_z = gpu.forward(q, k, v, 0.07, segments, interpret=harness.on_hopper())
    want = definition(q, k, v, 0.07, np.asarray(segments))
    assert harness.relative_error(y, want) < 6e-3  # weights and outputs are rounded to 8 bits
    exact = reference.forward(*(x.astype(jnp.float32) for x in (q, k, v)), 0.07, segments)[1]
    np.testing.assert_allclose(log_z, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
@harness.interprets
def test_the_hopper_kernels_give_the_gradients_of_the_definition(name):
    q, k, v, g, segments = of_case(cases.SMALL[name], jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    y, log_z = reference.forward(*wide[:3], 0.07, segments)
    want = reference.backward(*wide[:3], 0.07, segments, y, log_z, wide[3])
    got = gpu_backward.backward(q, k, v, 0.07, segments, y, log_z, g, interpret=harness.on_hopper())
    for a, b in zip(got, want, strict=True):
        # Weights and their cotangents are rounded to 8 bits. Documents of one token have zeros here.
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 6e-3 * np.linalg.norm(b) + 1e-4


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_hopper_kernels_meet_all_that_is_seen_and_mask_what_is_not_seen_whole(lengths, blocks):
    length = blocks * gpu.BLOCK
    segments = np.repeat(np.arange(len(lengths)), lengths)[:length]
    segments = np.pad(segments, (0, length - len(segments)), constant_values=len(lengths))[None]
    position = np.arange(length)
    seen = (segments[0][:, None] == segments[0][None]) & (position[:, None] >= position[None])
    first = reference.first_seen(jnp.asarray(segments))
    for pairs, size, counts, order in (
        (seen, tuning.HOPPER_KEYS.positions, gpu_backward.counts_of_keys, gpu_backward.earlier),
        (seen.T, tuning.HOPPER_QUERIES.positions, gpu_backward.counts_of_queries, gpu_backward.later),
    ):
        own = gpu.BLOCK // size
        for block, numbers in enumerate(np.asarray(counts(first, size)).reshape(-1, 2)):
            back, loops = order(*numbers, own)
            tiles = pairs.reshape(blocks, gpu.BLOCK, -1, size)[block].transpose(1, 0, 2)
            visible, whole = tiles.any((1, 2)), tiles.all((1, 2))
            at = block * own - back
            met = np.zeros_like(visible)
            for count, hide in loops:
                met[at : at + count] = True
                assert hide is gpu_backward.hide_unseen or whole[at : at + count].all()
                at += count
            assert at <= len(visible) and not (visible & ~met).any()


@pytest.mark.parametrize("case", [cases.FULL["pretraining"], cases.FULL["long context, a part of the heads"]])
@needs_cuda_plugin
def test_hopper_compiles_the_kernels_without_spills(case):
    q = harness.shape(case.batch, case.length, case.heads, case.width)
    v = harness.shape(case.batch, case.length, case.heads, case.value_width)
    segments = harness.shape(case.batch, case.length, dtype=jnp.int32)
    log_z = harness.shape(case.batch, case.heads, case.length, dtype=jnp.float32)
    kernels = compile_kernels(lambda q, k, v, s: gpu.forward(q, k, v, 0.1, s), q, q, v, segments)
    gradient = lambda q, k, v, s, z, g: gpu_backward.backward(q, k, v, 0.1, s, v, z, g)  # noqa: E731
    kernels += compile_kernels(gradient, q, q, v, segments, log_z, v)
    assert_fits(kernels)
    assert len(kernels) == 3 and all(kernel.uses("wgmma.mma_async") for kernel in kernels)


@pytest.mark.parametrize(
    ("length", "width", "value_width", "dtype"),
    [(4000, 192, 128, jnp.bfloat16), (4096, 128, 128, jnp.bfloat16), (4096, 192, 128, jnp.float32)],
)
def test_hopper_leaves_what_its_kernel_was_not_made_for(length, width, value_width, dtype):
    q, v = (harness.shape(1, length, 2, w, dtype=dtype) for w in (width, value_width))
    assert not gpu.serves(q, v)


def test_a_checked_shard_map_gives_the_values_of_the_definition():
    q, k, v, _, segments = of_case(cases.SMALL["documents across blocks"], jnp.bfloat16)
    assert gpu.serves(q, v)  # so that its kernel is traced too
    rows = jax.P("rows")
    sharded = jax.shard_map(
        lambda q, k, v, segments: attention(q, k, v, 0.07, segments),
        mesh=jax.make_mesh(
            (1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
        ),
        in_specs=(rows,) * 4,
        out_specs=rows,
    )
    want = definition(q, k, v, 0.07, np.asarray(segments))
    assert harness.relative_error(jax.jit(sharded)(q, k, v, segments), want) < 6e-3  # rounded to 8 bits


def test_forward_and_backward_are_the_halves_of_attention():
    q, k, v, segments = inputs(40)
    y, log_z = forward(q, k, v, 0.3, segments)
    got = backward(q, k, v, 0.3, segments, y, log_z, jnp.ones_like(y))
    want = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, 0.3, segments)), (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("case", cases.FULL.values(), ids=cases.FULL.keys())
@harness.needs_libtpu
def test_the_tpu_kernels_compile_at_full_size(case, chip):
    q = harness.shape(case.batch, case.length, case.heads, case.width)
    v = harness.shape(case.batch, case.length, case.heads, case.value_width)
    segments = harness.shape(case.batch, case.length, dtype=jnp.int32)
    log_z = harness.shape(case.batch, case.heads, case.length, dtype=jnp.float32)
    harness.compile_for(chip, lambda q, k, v, s: tpu.forward(q, k, v, 0.1, s), q, q, v, segments)
    gradient = lambda q, k, v, s, z, g: tpu.backward(q, k, v, 0.1, s, v, z, g)  # noqa: E731
    harness.compile_for(chip, gradient, q, q, v, segments, log_z, v)


def test_shapes_and_types_that_do_not_fit_are_refused():
    q, k, v, segments = inputs(8)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :4], v, 0.3, segments)
    with pytest.raises(ValueError, match="cast all three"):
        attention(q.astype(np.float16), k.astype(np.float16), v.astype(np.float16), 0.3, segments)
