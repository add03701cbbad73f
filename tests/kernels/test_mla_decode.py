"""Decoding attends to the tokens of its sequence and to nothing else, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode import cases, gpu, tpu
from tests.kernels import harness
from tests.kernels.hopper_compiler import assert_fits, compile_kernels, needs_cuda_plugin

SCALE = 0.11
# FP32 sums of a few hundred terms; a kernel in BF16 rounds its weights and its result to 8 bits.
BOUND = {np.dtype(np.float32): 3e-6, np.dtype(harness.BF16): 6e-3}


def operands(case, dtype=np.float32, seed=0):
    """Sequences of different lengths, one of them empty, in a cache with garbage past each end."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(case.batch, case.queries, case.heads, case.width)).astype(dtype)
    cache = rng.normal(size=(case.batch, case.tokens, case.width)).astype(dtype)
    lengths = rng.integers(case.queries, case.tokens + 1, case.batch).astype(np.int32)
    lengths[0], lengths[-1] = case.tokens, 0
    cache[np.arange(case.tokens) >= lengths[:, None]] = np.nan
    return q, cache, lengths


def definition(q, cache, lengths, width):
    """A query at a time, in float64."""
    y = np.zeros((*q.shape[:3], width))
    log_z = np.full(q.shape[:3], -np.inf)
    for b, length in enumerate(lengths):
        for t in range(q.shape[1]):
            end = min(length - (q.shape[1] - 1 - t), cache.shape[1])
            if end <= 0:
                continue
            seen = cache[b, :end].astype(np.float64)
            scores = q[b, t].astype(np.float64) @ seen.T * SCALE
            weights = np.exp(scores - scores.max(1, keepdims=True))
            y[b, t] = weights / weights.sum(1, keepdims=True) @ seen[:, :width]
            log_z[b, t] = scores.max(1) + np.log(weights.sum(1))
    return y, log_z


def paged(cache, lengths, page, seed=0):
    """The same tokens in shuffled pages, with a table that holds garbage past each end."""
    rng = np.random.default_rng(seed)
    most = -(-cache.shape[1] // page)
    padded = np.pad(cache, ((0, 0), (0, most * page - cache.shape[1]), (0, 0)), constant_values=np.nan)
    places = rng.permutation(len(cache) * most + 3)[: len(cache) * most]
    pages = np.full((len(cache) * most + 3, page, cache.shape[2]), np.nan, cache.dtype)
    pages[places] = padded.reshape(-1, page, cache.shape[2])
    table = places.reshape(len(cache), most).astype(np.int32)
    table[np.arange(most) * page >= lengths[:, None]] = -1
    return pages, table


def check(got, q, cache, lengths, width):
    want, want_z = definition(q, cache, lengths, width)
    assert harness.relative_error(got[0], want) < BOUND[q.dtype]
    seen = np.isfinite(want_z)
    tolerance = 2e-5 if q.dtype == np.float32 else 2e-4
    np.testing.assert_allclose(np.asarray(got[1])[seen], want_z[seen], atol=tolerance)
    assert (np.asarray(got[1])[~seen] == -np.inf).all()
    assert not np.asarray(got[0], np.float32)[~seen].any()


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL)
def test_the_values_are_those_of_the_definition(case):
    q, cache, lengths = operands(case)
    check(mla_decode.decode(q, cache, lengths, SCALE, width=case.latent), q, cache, lengths, case.latent)


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL)
def test_pages_in_any_order_give_the_same(case):
    q, cache, lengths = operands(case)
    pages, table = paged(cache, lengths, case.page)
    got = mla_decode.decode_paged(q, pages, table, lengths, SCALE, width=case.latent)
    check(got, q, cache, lengths, case.latent)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(3, 90), st.integers(1, 30))
def test_any_shape(batch, queries, heads, tokens, page):
    sizes = {"batch": batch + 1, "queries": queries, "heads": heads, "tokens": tokens}
    q, cache, lengths = operands(cases.Case(**sizes, latent=12, rotated=4), seed=page)
    check(mla_decode.decode(q, cache, lengths, SCALE, width=12), q, cache, lengths, 12)
    pages, table = paged(cache, lengths, page)
    check(mla_decode.decode_paged(q, pages, table, lengths, SCALE, width=12), q, cache, lengths, 12)


def test_parts_of_a_sequence_merge_into_the_whole():
    case = cases.SMALL["four new tokens"]
    q, cache, lengths = operands(case)
    cut = 64
    parts = [
        mla_decode.decode(q, part, lengths - first, SCALE, width=case.latent)
        for part, first in ((cache[:, :cut], 0), (cache[:, cut:], cut))
    ]
    got = mla_decode.merge(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    check(got, q, cache, lengths, case.latent)


def test_what_is_not_finite_stays_in_its_sequence():
    case = cases.SMALL["one new token"]
    q, cache, lengths = operands(case)
    lengths[:] = case.tokens
    cache = np.nan_to_num(cache, nan=0.5)
    cache[1, 3] = np.nan
    y, _ = mla_decode.decode(q, cache, lengths, SCALE, width=case.latent)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[2]).all()


def test_operands_that_do_not_fit_are_refused():
    q, cache, lengths = operands(cases.SMALL["one new token"])
    with pytest.raises(ValueError, match="need one width"):
        mla_decode.decode(q, cache[..., :-1], lengths, SCALE, width=128)
    with pytest.raises(ValueError, match="need one width"):
        mla_decode.decode(q, cache, lengths, SCALE, width=1000)
    with pytest.raises(ValueError, match="cast both"):
        mla_decode.decode(q.astype(harness.BF16), cache, lengths, SCALE, width=128)
    with pytest.raises(ValueError, match="one for each"):
        mla_decode.decode(q, cache[:-1], lengths, SCALE, width=128)
    with pytest.raises(ValueError, match="int32 for each"):
        mla_decode.decode(q, cache, lengths[:-1], SCALE, width=128)
    with pytest.raises(ValueError, match="one row for each"):
        mla_decode.decode_paged(q, cache, np.zeros((1, 4), np.int32), lengths, SCALE, width=128)


# In BF16 the second is served on Hopper, so that its kernel is traced too.
@pytest.mark.parametrize(("name", "dtype"), [("one new token", np.float32), ("whole blocks", harness.BF16)])
def test_a_checked_shard_map_gives_the_values_of_the_definition(name, dtype):
    case = cases.SMALL[name]
    q, cache, lengths = operands(case, dtype)
    rows = jax.P("rows")
    mesh = jax.make_mesh((3,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    sharded = jax.shard_map(
        lambda *a: mla_decode.decode(*a, SCALE, width=case.latent),
        mesh=mesh,
        in_specs=(rows,) * 3,
        out_specs=rows,
    )
    check(jax.jit(sharded)(q, cache, lengths), q, cache, lengths, case.latent)


@pytest.mark.parametrize("dtype", [np.float32, harness.BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL)
@harness.interprets
def test_the_tpu_kernel_is_the_definition(case, dtype):
    q, cache, lengths = operands(case, dtype)
    options = {"width": case.latent, "tokens": 128, "interpret": harness.on_tpu()}
    check(tpu.decode(q, cache, lengths, SCALE, **options), q, cache, lengths, case.latent)


@pytest.mark.parametrize("case", cases.SMALL.values(), ids=cases.SMALL)
@harness.interprets
def test_the_tpu_kernel_finds_pages_in_any_order(case):
    q, cache, lengths = operands(case)
    pages, table = paged(cache, lengths, case.page)
    options = {"width": case.latent, "tokens": 64, "interpret": harness.on_tpu()}
    check(tpu.decode_paged(q, pages, table, lengths, SCALE, **options), q, cache, lengths, case.latent)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["whole blocks", "more rows than a block"])
@harness.interprets
def test_the_hopper_kernel_is_the_definition_whole_or_in_parts(name, parts):
    case = cases.SMALL[name]
    q, cache, lengths = operands(case, harness.BF16)
    assert gpu.serves(q, cache, case.latent)
    options = {"width": case.latent, "parts": parts, "interpret": harness.on_hopper()}
    check(gpu.decode(q, cache, lengths, SCALE, **options), q, cache, lengths, case.latent)
    pages, table = paged(cache, lengths, case.page)
    check(gpu.decode_paged(q, pages, table, lengths, SCALE, **options), q, cache, lengths, case.latent)


def test_hopper_leaves_what_its_kernel_was_not_made_for():
    case = cases.SMALL["the widths of DeepSeek-V3"]
    q, cache, _ = operands(case, harness.BF16)
    assert not gpu.serves(q, cache, case.latent)  # 130 tokens
    q, cache, _ = operands(cases.SMALL["whole blocks"])
    assert not gpu.serves(q, cache, case.latent)  # float32


def abstract(case):
    q = harness.shape(case.batch, case.queries, case.heads, case.width)
    lengths = harness.shape(case.batch, dtype=jnp.int32)
    return q, harness.shape(case.batch, case.tokens, case.width), lengths


DISTINCT = ("one sequence", "a large batch, two new tokens", "an eighth of the heads")


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("name", DISTINCT)
@harness.needs_libtpu
def test_the_tpu_kernel_compiles_at_full_size(name, chip):
    case = cases.FULL[name]
    harness.compile_for(chip, lambda *a: tpu.decode(*a, SCALE, width=case.latent), *abstract(case))


@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_the_tpu_kernel_of_pages_compiles_at_full_size(chip):
    case = cases.FULL["a large batch"]
    q, _, lengths = abstract(case)
    most = case.tokens // case.page
    pages = harness.shape(case.batch * most, case.page, case.width)
    table = harness.shape(case.batch, most, dtype=jnp.int32)
    kernel = lambda *a: tpu.decode_paged(*a, SCALE, width=case.latent)  # noqa: E731
    harness.compile_for(chip, kernel, q, pages, table, lengths)


@pytest.mark.parametrize("name", DISTINCT)
@needs_cuda_plugin
def test_hopper_compiles_the_kernel_without_spills(name):
    case = cases.FULL[name]
    q, cache, lengths = abstract(case)
    kernels = compile_kernels(lambda *a: gpu.decode(*a, SCALE, width=case.latent), q, cache, lengths)
    pages = harness.shape(case.batch * case.tokens // case.page, case.page, case.width)
    table = harness.shape(case.batch, case.tokens // case.page, dtype=jnp.int32)
    kernel = lambda *a: gpu.decode_paged(*a, SCALE, width=case.latent)  # noqa: E731
    kernels += compile_kernels(kernel, q, pages, table, lengths)
    assert_fits(kernels)
    assert all(kernel.uses("wgmma.mma_async") for kernel in kernels)
