"""Every implementation of the grouped products is the product of its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import quantize
from pallas_kernels.grouped_matmul import cases, cpu, gpu, gpu_bf16, reference, tpu
from pallas_kernels.hopper_tiles import Tiles
from tests.kernels import harness
from tests.kernels.harness import numbers
from tests.kernels.hopper_compiler import assert_fits, compile_kernels, needs_cuda_plugin

_tpu = lambda f: functools.partial(f, interpret=harness.on_tpu())  # noqa: E731
IMPLEMENTATIONS = pytest.mark.parametrize("matmul", [grouped.matmul, cpu.matmul, reference.matmul])
WEIGHT_GRADIENTS = pytest.mark.parametrize("gradient", [cpu.weight_gradient, reference.weight_gradient])
ALIGNMENTS = pytest.mark.parametrize("alignment", [1, 8, 128])
UNEVEN = [[130, 0, 70, 256], [0, 0, 0, 300], [300, 0, 0, 0], [1, 127, 128, 2]]
# FP32 sums of at most 500 products of unit normals: 2^-24 sqrt(500) relative, and room for the order.
BOUND = 1e-6


def starts(sizes, alignment):
    padded = [-(-n // alignment) * alignment for n in sizes]
    return np.concatenate([[0], np.cumsum(padded)])[: len(sizes)], sum(padded)


def operands(sizes, width, columns, alignment=1, spare=0, seed=0):
    """Rows of groups; zero between them."""
    rng = np.random.default_rng(seed)
    first, total = starts(sizes, alignment)
    x = np.zeros((max(total + spare, 1), width), np.float32)
    for start, n in zip(first, sizes, strict=True):
        x[start : start + n] = rng.normal(size=(n, width))
    return x, rng.normal(size=(len(sizes), width, columns)).astype(np.float32), np.array(sizes, np.int32)


def members(sizes, alignment):
    """Each group's rows."""
    return [np.arange(a, a + n) for a, n in zip(starts(sizes, alignment)[0], sizes, strict=True)]


def check_rows(got, x, w, sizes, alignment, bound=BOUND):
    for g, mine in enumerate(members(sizes, alignment)):
        if len(mine):
            assert harness.relative_error(got[mine], x[mine].astype(np.float64) @ w[g]) < bound


def check_sums(got, x, g, sizes, alignment, bound=BOUND):
    for i, mine in enumerate(members(sizes, alignment)):
        want = x[mine].T.astype(np.float64) @ g[mine]
        assert np.linalg.norm(got[i] - want) <= bound * np.linalg.norm(want), i


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 8, 32]),
)
@IMPLEMENTATIONS
def test_rows_meet_the_matrix_of_their_group(matmul, sizes, spare, width, columns, alignment):
    x, w, n = operands(sizes, width, columns, alignment, spare)
    got = matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(n), alignment)
    assert got.shape == (x.shape[0], columns)
    check_rows(np.asarray(got), x, w, sizes, alignment, 1e-5)


@pytest.mark.parametrize("sizes", [[600, 0, 0], [0, 0, 600], [257, 1, 342]])
@IMPLEMENTATIONS
def test_uneven_groups_longer_than_a_tile(matmul, sizes):
    x, w, n = operands(sizes, 16, 24)
    check_rows(np.asarray(matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(n))), x, w, sizes, 1)


@ALIGNMENTS
@pytest.mark.parametrize("sizes", [[600, 0, 3], [5, 0, 7], [0, 0, 0]])
@WEIGHT_GRADIENTS
def test_weight_gradients_are_sums_over_the_rows_of_the_group(gradient, sizes, alignment):
    x, _, n = operands(sizes, 16, 24, alignment, spare=9)
    g, _, _ = operands(sizes, 24, 1, alignment, spare=9, seed=1)
    got = gradient(jnp.asarray(x), jnp.asarray(g), jnp.asarray(n), alignment)
    check_sums(np.asarray(got), x, g, sizes, alignment)


@ALIGNMENTS
def test_gradients_equal_those_of_the_definition(alignment):
    sizes = [5, 0, 9]
    x, w, n = map(jnp.asarray, operands(sizes, 4, 6, alignment, spare=2))
    mine = np.concatenate(members(sizes, alignment))
    loss = lambda f: lambda x, w: jnp.sum(jnp.sin(f(x, w, n, alignment)[mine]))  # noqa: E731
    got = jax.grad(loss(grouped.matmul), (0, 1))(x, w)
    want = jax.grad(loss(reference.matmul), (0, 1))(x, w)
    np.testing.assert_allclose(got[0][mine], want[0][mine], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_nan_stays_in_its_row():
    x, w, sizes = operands([3, 4], 4, 5)
    x[1] = np.nan
    got = np.asarray(grouped.matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes)))
    assert np.isnan(got[1]).all()
    assert np.isfinite(np.delete(got, 1, axis=0)).all()


@ALIGNMENTS
@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_fp8_products_are_those_of_the_numbers_that_the_values_stand_for(sizes, alignment):
    x, w, n = operands(sizes, 200, 72, alignment)
    rows, matrices = quantize.quantize(x), quantize.quantize(w.swapaxes(1, 2), (128, 128))
    got = grouped.fp8_matmul(rows, matrices, jnp.asarray(n), alignment, jnp.float32)
    check_rows(np.asarray(got), numbers(rows), numbers(matrices).swapaxes(1, 2), sizes, alignment)


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_fp8_sums_over_rows_go_on_from_those_given(sizes):
    x, _, n = operands(sizes, 72, 1, 128)
    g, _, _ = operands(sizes, 40, 1, 128, seed=1)
    columns = quantize.transposed(x), quantize.transposed(g)
    into = np.random.default_rng(2).normal(size=(4, 72, 40)).astype(np.float32)
    got = grouped.fp8_weight_gradient(*columns, jnp.asarray(n), 128, into) - into
    check_sums(np.asarray(got), numbers(columns[0]).T, numbers(columns[1]).T, sizes, 128, 2e-6)


@ALIGNMENTS
@pytest.mark.parametrize("sizes", UNEVEN[:2], ids=str)
@harness.interprets
def test_the_tpu_kernels_take_groups_that_start_anywhere(sizes, alignment):
    x, w, n = operands(sizes, 256, 200, alignment, spare=40)
    g, _, _ = operands(sizes, 200, 1, alignment, spare=40, seed=1)
    check_rows(np.asarray(_tpu(tpu.matmul)(x, w, n, alignment)), x, w, sizes, alignment)
    check_sums(np.asarray(_tpu(tpu.weight_gradient)(x, g, n, alignment)), x, g, sizes, alignment)
    rows, matrices = quantize.quantize(x), quantize.quantize(w.swapaxes(1, 2), (128, 128))
    got = _tpu(tpu.fp8_matmul)(rows, matrices, n, alignment, jnp.float32)
    check_rows(np.asarray(got), numbers(rows), numbers(matrices).swapaxes(1, 2), sizes, alignment)


@pytest.mark.parametrize("sizes", UNEVEN[:2], ids=str)
@harness.interprets
def test_fp8_sums_of_the_tpu_kernel_go_on_from_those_given(sizes):
    x, _, n = operands(sizes, 72, 1, 128, spare=40)
    g, _, _ = operands(sizes, 40, 1, 128, spare=40, seed=1)
    columns = quantize.transposed(x), quantize.transposed(g)
    into = np.random.default_rng(2).normal(size=(4, 72, 40)).astype(np.float32)
    got = _tpu(tpu.fp8_weight_gradient)(*columns, n, 128, into) - into
    check_sums(np.asarray(got), numbers(columns[0]).T, numbers(columns[1]).T, sizes, 128, 2e-6)


# Depths of one block, which is fewer than there are stages, and of several, odd in number.
@pytest.mark.parametrize("depth", [96, 640])
@pytest.mark.parametrize("sizes", cases.SMALL.values(), ids=cases.SMALL)
@harness.interprets
def test_the_hopper_kernel_meets_the_matrix_of_each_group(sizes, depth):
    x, w, n = operands(sizes, depth, 136, 128, spare=40)  # three tiles of columns, shared by two programs
    rows, matrices = quantize.quantize(x), quantize.quantize(w.swapaxes(1, 2), (128, 128))
    options = {"tiles": Tiles(64, 3, 2, 2), "interpret": harness.on_hopper(), "sms": 4}
    got = gpu.fp8_matmul(rows, matrices, n, 128, jnp.float32, **options)
    check_rows(np.asarray(got), numbers(rows), numbers(matrices).swapaxes(1, 2), sizes, 128)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("sizes", cases.SMALL.values(), ids=cases.SMALL)
@harness.interprets
def test_the_hopper_kernel_sums_over_the_rows_of_each_group(sizes, goes_on):
    x, _, n = operands(sizes, 136, 1, 128, spare=40)
    g, _, _ = operands(sizes, 72, 1, 128, spare=40, seed=1)
    columns = quantize.transposed(x), quantize.transposed(g)
    into = np.random.default_rng(2).normal(size=(3, 136, 72)).astype(np.float32) if goes_on else None
    options = {"tiles": Tiles(64, 3, 1, 2), "interpret": harness.on_hopper(), "sms": 4}
    got = gpu.fp8_weight_gradient(*columns, n, 128, into, **options)
    got = np.asarray(got) - (0 if into is None else into)
    check_sums(got, numbers(columns[0]).T, numbers(columns[1]).T, sizes, 128, 2e-6)


@pytest.mark.parametrize("sizes", cases.SMALL.values(), ids=cases.SMALL)
@harness.interprets
def test_the_hopper_kernels_multiply_bf16(sizes):
    x, w, n = operands(sizes, 128, 192, 128, spare=40)  # three tiles of columns, shared by two programs
    g, _, _ = operands(sizes, 192, 1, 128, spare=40, seed=1)
    x, w, g = (numbers.astype(harness.BF16) for numbers in (x, w, g))
    assert gpu_bf16.serves(x, w, 128)
    options = {"tiles": Tiles(64, 3, 1, 2), "interpret": harness.on_hopper(), "sms": 4}
    exact = [numbers.astype(np.float32) for numbers in (x, w, g)]
    rounding = 2.0**-8  # of results
    got = np.asarray(gpu_bf16.matmul(x, w, n, 128, **options), np.float32)
    check_rows(got, exact[0], exact[1], sizes, 128, rounding)
    got = np.asarray(gpu_bf16.matmul_transposed(g, w, n, 128, **options), np.float32)
    check_rows(got, exact[2], exact[1].swapaxes(1, 2), sizes, 128, rounding)
    got = np.asarray(gpu_bf16.weight_gradient(x, g, n, 128, **options), np.float32)
    check_sums(got, exact[0], exact[2], sizes, 128, rounding)


@pytest.mark.parametrize(
    ("dtype", "columns", "alignment"), [("float32", 192, 128), ("bfloat16", 200, 128), ("bfloat16", 192, 64)]
)
def test_hopper_leaves_what_its_bf16_kernels_were_not_made_for(dtype, columns, alignment):
    x, w = harness.shape(256, 128, dtype=dtype), harness.shape(2, 128, columns, dtype=dtype)
    assert not gpu_bf16.serves(x, w, alignment)


def test_a_checked_shard_map_gives_the_values_and_gradients_of_the_definition():
    sizes = [130, 0, 70]
    x, w, n = operands(sizes, 128, 192, 128, spare=40)
    x, w, n = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.asarray(n)
    assert gpu_bf16.serves(x, w, 128)  # so that its kernels are traced too
    mine = np.concatenate(members(sizes, 128))

    def value_and_gradients(x, w, n):
        y, pull = jax.vjp(lambda x, w: grouped.matmul(x, w, n, 128), x, w)
        return y, *pull(x @ jnp.ones((128, 192), jnp.bfloat16))

    devices = jax.P("devices")
    sharded = jax.shard_map(
        lambda *a: jax.tree.map(lambda y: y[None], value_and_gradients(*(x[0] for x in a))),
        mesh=jax.make_mesh(
            (2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
        ),
        in_specs=devices,
        out_specs=devices,
    )
    got = jax.jit(sharded)(*(jnp.stack([a, a]) for a in (x, w, n)))
    for a, b in zip(got, value_and_gradients(x, w, n), strict=True):
        rows = mine if b.ndim == 2 else slice(None)
        assert (
            harness.relative_error(np.asarray(a[1], np.float32)[rows], np.asarray(b, np.float32)[rows]) < 4e-3
        )


@pytest.mark.parametrize("case", cases.FULL.values(), ids=cases.FULL)
@needs_cuda_plugin
def test_hopper_compiles_the_bf16_kernels_without_spills(case):
    sizes = harness.shape(case.groups, dtype=jnp.int32)
    x, g = harness.shape(case.rows, case.depth), harness.shape(case.rows, case.columns)
    w = harness.shape(case.groups, case.depth, case.columns)
    kernels = compile_kernels(gpu_bf16.matmul, x, w, sizes)
    kernels += compile_kernels(gpu_bf16.matmul_transposed, g, w, sizes)
    kernels += compile_kernels(gpu_bf16.weight_gradient, x, g, sizes)
    assert_fits(kernels)
    assert all(kernel.uses("bf16.bf16") for kernel in kernels)


@pytest.mark.parametrize("case", cases.FULL.values(), ids=cases.FULL)
@needs_cuda_plugin
def test_hopper_compiles_the_kernels_without_spills(case):
    sizes = harness.shape(case.groups, dtype=jnp.int32)
    x = harness.scaled_shape(case.rows, case.depth, tile=(1, 128))
    w = harness.scaled_shape(case.groups, case.columns, case.depth, tile=(128, 128))
    kernels = compile_kernels(gpu.fp8_matmul, x, w, sizes)
    x, g = (harness.scaled_shape(n, case.rows, tile=(1, 128)) for n in (case.depth, case.columns))
    into = harness.shape(case.groups, case.depth, case.columns, dtype=jnp.float32)
    kernels += compile_kernels(gpu.fp8_weight_gradient, x, g, sizes)
    kernels += compile_kernels(
        lambda x, g, s, into: gpu.fp8_weight_gradient(x, g, s, 128, into), x, g, sizes, into
    )
    assert_fits(kernels)
    assert all(kernel.uses("e4m3.e4m3") for kernel in kernels)


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("groups", [8, 32])
@harness.needs_libtpu
def test_the_tpu_kernels_compile_at_full_size(groups, chip):
    sizes = harness.shape(groups, dtype=jnp.int32)
    for inner, outer in ((7168, 4096), (2048, 7168)):
        rows, w = harness.shape(32768, inner), harness.shape(groups, inner, outer)
        harness.compile_for(chip, lambda x, w, s: tpu.matmul(x, w, s, 128), rows, w, sizes)
        for k, n in ((inner, outer), (outer, inner)):  # forward, and the gradient of the input
            x = harness.scaled_shape(32768, k, tile=(1, 128))
            w = harness.scaled_shape(groups, n, k, tile=(128, 128))
            harness.compile_for(chip, lambda x, w, s: tpu.fp8_matmul(x, w, s, 128), x, w, sizes)


@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_the_fp8_weight_gradient_compiles_at_full_size(chip):
    x, g = (harness.scaled_shape(width, 32768, tile=(1, 128)) for width in (7168, 4096))
    sizes, into = harness.shape(8, dtype=jnp.int32), harness.shape(8, 7168, 4096, dtype=jnp.float32)
    add = lambda x, g, sizes, into: tpu.fp8_weight_gradient(x, g, sizes, 128, into)  # noqa: E731
    harness.compile_for(chip, add, x, g, sizes, into)


def test_what_does_not_fit_is_refused():
    x, w, sizes = operands([3, 4], 4, 5)
    with pytest.raises(ValueError, match="Rows of width 3 .* do not fit matrices"):
        grouped.matmul(jnp.asarray(x[:, :3]), jnp.asarray(w), jnp.asarray(sizes))
    with pytest.raises(ValueError, match="cast one to the other"):
        grouped.matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), jnp.asarray(sizes))
    columns = quantize.transposed(x)
    with pytest.raises(ValueError, match="align them to a multiple of 128"):
        grouped.fp8_weight_gradient(columns, columns, jnp.asarray(sizes), 64)
