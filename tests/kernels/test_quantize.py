"""Scales and values of quantisation are those that numpy computes, to the last bit."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize
from pallas_kernels.quantize import cases, gpu, gpu_pack, reference, tpu, tpu_pack
from pallas_kernels.scaled import dequantize, exact, power_of_two
from tests.kernels import harness
from tests.kernels.harness import BF16, hard, numbers
from tests.kernels.hopper_compiler import assert_fits, compile_kernels, needs_cuda_plugin

TILES = [(1, 128), (128, 1), (128, 128), (1, 256)]
FINITE = [name for name in harness.HARD if name not in ("nan", "inf")]


def by_hand(x, tile, rounded):
    """E4M3 values and FP32 scales, in numpy."""
    rows, columns = x.shape
    padded = np.pad(np.abs(x), ((0, -rows % tile[0]), (0, -columns % tile[1])))
    amax = padded.reshape(-1, tile[0], padded.shape[1] // tile[1], tile[1]).max((1, 3))
    scales = np.maximum(amax, np.float32(2.0**-100)) * np.float32(1 / 448)
    if rounded:
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    factors = np.repeat(np.repeat(np.float32(1) / scales, tile[0], 0), tile[1], 1)[:rows, :columns]
    return (x * factors).astype(ml_dtypes.float8_e4m3fn), scales


@pytest.mark.parametrize(("scale", "rounded"), [(exact, False), (power_of_two, True)], ids=["exact", "power"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", FINITE)
def test_values_and_scales_are_bit_exact(name, tile, scale, rounded):
    x = hard(name, 200, 576)
    values, scales = by_hand(x, tile, rounded)
    got = jax.jit(lambda x: quantize.quantize(x, tile, scale))(x)
    np.testing.assert_array_equal(got.scales, scales)
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), values.view(np.uint8))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(TILES), st.integers(-90, 90))
def test_each_number_is_within_half_a_step_of_e4m3(rows, columns, tile, exponent):
    x = hard("normal", rows, columns) * np.float32(2.0**exponent)
    got = quantize.quantize(x, tile)
    scales = np.repeat(np.repeat(np.asarray(got.scales, np.float64), tile[0], 0), tile[1], 1)[:rows, :columns]
    # Half of 2^-3 relative to a normal value, half of 2^-9 of the scale below; and FP32's own rounding.
    bound = np.maximum(np.abs(x) * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(numbers(got) - x) <= bound).all()


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_what_is_not_finite_stays_so_and_leaves_other_tiles_alone(name):
    x = hard(name, 8, 512)
    got = np.asarray(dequantize(quantize.quantize(x)))
    assert np.isnan(got[~np.isfinite(x)]).all()
    tile_of = np.zeros_like(x, bool)
    tile_of[4, 256:384] = True
    assert np.isfinite(got[~tile_of]).all()


def test_stacks_are_quantised_matrix_by_matrix():
    x = np.stack([hard("normal", 130, 200), hard("edges", 130, 200)])
    got = quantize.quantize(x, (128, 128))
    for i in range(2):
        alone = quantize.quantize(x[i], (128, 128))
        np.testing.assert_array_equal(got.scales[i], alone.scales)
        np.testing.assert_array_equal(np.asarray(got.values[i]), np.asarray(alone.values))


def test_quantising_along_tokens_adds_no_error_to_powers_of_two():
    # E4M3 rows times powers of two: along the other axis only exponents move, within 2^5 of each other here.
    x = hard("normal", 256, 384)
    x = np.sign(x) * np.clip(np.abs(x), 0.25, 2.0)
    rows = quantize.quantize(x, scale=power_of_two)
    columns = quantize.transposed(rows, scale=power_of_two)
    np.testing.assert_array_equal(numbers(columns).T, numbers(rows))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(-60, 60))
def test_twelve_bits_keep_six_of_the_mantissa(rows, half, exponent):
    x = (hard("normal", rows, 2 * half) * np.float32(2.0**exponent)).astype(BF16)
    bits, scales = quantize.pack(x)
    assert bits.shape == (rows, 3, half) and bits.dtype == jnp.uint8
    got, want = np.asarray(quantize.unpack(bits, scales), np.float64), x.astype(np.float64)
    step = (
        np.repeat(np.asarray(scales, np.float64), 128, 1)[:, : 2 * half] * 2.0**-20
    )  # below the least normal
    assert (np.abs(got - want) <= np.maximum(np.abs(want) * 2.0**-7, step / 2)).all()
    again = quantize.unpack(*quantize.pack(quantize.unpack(bits, scales)))
    np.testing.assert_array_equal(np.asarray(again, np.float64), got)  # what 12 bits hold they hold exactly


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_twelve_bits_carry_what_is_not_finite(name):
    x = hard(name, 8, 512, BF16)
    got = np.asarray(quantize.unpack(*quantize.pack(x)), np.float32)
    assert not np.isfinite(got[~np.isfinite(x.astype(np.float32))]).any()


def swiglu(hidden, weights):
    gate, up = np.split(hidden.astype(np.float64), 2, 1)
    return gate / (1 + np.exp(-gate)) * up * weights[:, None]


def test_swiglu_is_quantised_from_fp32():
    hidden, weights = hard("normal", 60, 600, BF16), np.linspace(0.1, 2.5, 60, dtype=np.float32)
    got, want = quantize.swiglu(hidden, weights), swiglu(hidden, weights)
    assert harness.difference(numbers(got), want) < 1e-3
    columns = quantize.swiglu_transposed(hidden, weights)
    assert columns.shape == (300, 60) and harness.difference(numbers(columns).T, want) < 1e-3


def test_the_backward_pass_of_swiglu_is_its_derivative():
    rng = np.random.default_rng(0)
    hidden, weights = hard("normal", 20, 64), np.linspace(0.1, 2.5, 20, dtype=np.float32)
    g = rng.normal(size=(20, 32)).astype(np.float32)
    dhidden, dweights = quantize.swiglu_backward(hidden, weights, g)
    step = 1e-6
    for _ in range(5):
        direction, slope = rng.normal(size=hidden.shape), rng.normal(size=weights.shape)
        moved = [
            np.sum(g * swiglu(hidden + sign * step * direction, weights + sign * step * slope))
            for sign in (1, -1)
        ]
        # Differences of float64 are right to about 1e-9; the gradient is FP32.
        analytic = np.sum(dhidden * direction) + np.sum(dweights * slope)
        np.testing.assert_allclose(analytic, (moved[0] - moved[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def on_tpu(name, columns=256):
    """Several blocks of rows, and whole rows or several blocks of columns."""
    block = {"swiglu_backward": {"rows": 128}, "blocks": {}}.get(name, {"block": (128, columns)})
    return partial(getattr(tpu, name), **block, interpret=harness.on_tpu())


def on_hopper(name, columns=256):
    return partial(getattr(gpu, name), interpret=harness.on_hopper())


KERNELS = pytest.mark.parametrize("kernel", [on_tpu, on_hopper])


def packs_on_tpu(name, rows=None):
    return partial(getattr(tpu_pack, name), rows=rows, interpret=harness.on_tpu())


def packs_on_hopper(name, rows=None):
    return partial(getattr(gpu_pack, name), interpret=harness.on_hopper())


PACKERS = pytest.mark.parametrize("packer", [packs_on_tpu, packs_on_hopper])


def same(got, want):
    """To the last bit; where there is no number, in neither."""
    np.testing.assert_array_equal(got.scales, want.scales)
    np.testing.assert_array_equal(
        np.asarray(got.values).astype(np.float32), np.asarray(want.values).astype(np.float32)
    )


# Columns that end inside a tile, rows that end inside a block and inside a tile of tokens.
@pytest.mark.parametrize("scale", [exact, power_of_two])
@pytest.mark.parametrize("name", ["one huge", "denormal", "edges"])
@pytest.mark.parametrize(
    ("way", "columns", "tile"), [("quantize", 576, (1, 128)), ("blocks", 320, (128, 128))]
)
@KERNELS
@harness.interprets
def test_kernels_quantise_rows_and_blocks_as_the_definition_does(kernel, way, columns, tile, name, scale):
    x = hard(name, 200, columns)
    values, scales = by_hand(x, tile, scale is power_of_two)
    got = kernel(way, columns)(x, scale=scale)
    np.testing.assert_array_equal(got.scales, scales)
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), values.view(np.uint8))


@pytest.mark.parametrize("name", ["normal", "some zero tiles"])
@KERNELS
@harness.interprets
def test_kernels_quantise_tokens_as_the_definition_does(kernel, name):
    x = hard(name, 320, 576, BF16)
    same(kernel("transposed")(x), reference.transposed(x))
    rows = reference.quantize(x, scale=power_of_two)
    again = kernel("transposed")(rows, scale=power_of_two)
    same(again, reference.transposed(rows, scale=power_of_two))


@KERNELS
@harness.interprets
def test_what_is_not_finite_stays_so_in_kernels_and_leaves_other_tiles_alone(kernel):
    x = hard("normal", 256, 256)
    x[5, 130], x[7, 3] = np.nan, np.inf
    rows = kernel("quantize")(x)
    columns = kernel("transposed")(x)
    blocks = kernel("blocks")(x)
    tile_of = np.zeros_like(x, bool)
    tile_of[:128] = True
    assert np.isnan(np.asarray(dequantize(blocks))[~np.isfinite(x)]).all()
    assert np.isfinite(np.asarray(dequantize(blocks))[~tile_of]).all()
    tile_of = np.zeros_like(x, bool)
    tile_of[5, 128:] = tile_of[7, :128] = True
    assert np.isnan(np.asarray(dequantize(rows))[~np.isfinite(x)]).all()
    assert np.isfinite(np.asarray(dequantize(rows))[~tile_of]).all()
    tile_of = np.zeros_like(x, bool)
    tile_of[:128, 130] = tile_of[:128, 3] = True
    assert np.isnan(np.asarray(dequantize(columns)).T[~np.isfinite(x)]).all()
    assert np.isfinite(np.asarray(dequantize(columns)).T[~tile_of]).all()


def close(got, want):
    """The last bits of an exponential: scales differ by a few roundings, values by a step, and seldom."""
    np.testing.assert_allclose(got.scales, want.scales, rtol=2.0**-20)
    # E4M3 orders as its magnitude's bits do.
    magnitudes = [np.asarray(x.values).view(np.uint8).astype(int) & 0x7F for x in (got, want)]
    steps = np.abs(magnitudes[0] - magnitudes[1])
    assert steps.max() <= 1 and steps.mean() < 1e-3


@KERNELS
@harness.interprets
def test_kernels_fuse_swiglu_as_the_definition_does(kernel):
    hidden, weights = hard("normal", 192, 512, BF16), np.linspace(0.1, 2.5, 192, dtype=np.float32)
    rows = reference.quantize(hidden)
    close(kernel("swiglu")(hidden, weights), reference.swiglu(hidden, weights))
    close(kernel("swiglu_transposed")(rows, weights), reference.swiglu_transposed(rows, weights))
    close(kernel("swiglu_transposed")(hidden, None), reference.swiglu_transposed(hidden, None))
    assert harness.difference(numbers(kernel("swiglu")(hidden, weights)), swiglu(hidden, weights)) < 1e-3


@pytest.mark.parametrize("weighted", [True, False])
@KERNELS
@harness.interprets
def test_kernels_of_the_backward_pass_are_the_definition(kernel, weighted):
    rows = reference.quantize(hard("normal", 200, 512))
    weights = np.linspace(0.1, 2.5, 200, dtype=np.float32) if weighted else None
    g = hard("normal", 200, 256)
    got = kernel("swiglu_backward")(rows, weights, g)
    want = reference.swiglu_backward(rows, weights, g)
    # FP32 alone, and at most 256 terms of a sum in another order.
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["normal", "one huge", "denormal", "edges", "some zero tiles"])
@PACKERS
@harness.interprets
def test_kernels_pack_and_unpack_as_the_definition_does(packer, name):
    x = hard(name, 200, 512, BF16)
    bits, scales = packer("pack", 128)(x)
    for mine, other in zip((bits, scales), reference.pack(x), strict=True):
        np.testing.assert_array_equal(mine, other)
    got, want = packer("unpack", 128)(bits, scales), reference.unpack(bits, scales)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(want).view(np.uint16))


@PACKERS
@harness.interprets
def test_twelve_bits_carry_what_is_not_finite_in_kernels(packer):
    x = hard("normal", 64, 512, BF16)
    x[3, 5], x[4, 300], x[9, 500] = np.nan, np.inf, -np.inf
    got = np.asarray(packer("unpack")(*map(np.asarray, packer("pack")(x))), np.float32)
    assert not np.isfinite(got[~np.isfinite(x.astype(np.float32))]).any()
    assert np.isfinite(got[:, 128:256]).all() and np.isfinite(got[10:]).all()


@PACKERS
@harness.interprets
def test_every_code_of_twelve_bits_is_unpacked_as_the_definition_does(packer):
    codes = np.arange(4096).reshape(16, 256)
    bits = np.stack([codes & 0xFF, (codes >> 8) | ((codes & 0xF) << 4), codes >> 4], 1).astype(np.uint8)
    scales = np.exp2(np.arange(64).reshape(16, 4) - 32).astype(np.float32)
    got = packer("unpack")(bits, scales)
    np.testing.assert_array_equal(
        np.asarray(got).astype(np.float32), np.asarray(reference.unpack(bits, scales)).astype(np.float32)
    )


@settings(max_examples=2, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([exact, power_of_two]))
@harness.interprets
def test_the_tpu_kernels_serve_any_shape(rows, columns, scale):
    x = hard("normal", rows, columns)
    quantised = tpu.quantize(x, scale, interpret=harness.on_tpu())
    same(quantised, reference.quantize(x, scale=scale))
    same(tpu.transposed(x, scale, interpret=harness.on_tpu()), reference.transposed(x, scale=scale))
    same(tpu.blocks(x, scale, interpret=harness.on_tpu()), reference.quantize(x, (128, 128), scale))


def test_the_api_in_a_checked_shard_map_is_the_definition():
    rows = 200
    mesh = jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden, weights = hard("normal", rows, 512, BF16), np.linspace(0.1, 2.5, rows, dtype=np.float32)

    def all_of_it(hidden, weights):
        kept = quantize.quantize(hidden)
        return (
            kept,
            quantize.transposed(kept),
            quantize.swiglu(hidden, weights),
            quantize.swiglu_transposed(kept, None),
            quantize.quantize(hidden, (128, 128)),
        )

    spec = jax.P("one")
    inside = jax.shard_map(all_of_it, mesh=mesh, in_specs=spec, out_specs=spec)
    kept, columns, activation, tokens, blocks = jax.jit(inside)(jnp.asarray(hidden), jnp.asarray(weights))
    same(kept, reference.quantize(hidden))
    same(columns, reference.transposed(kept))
    same(blocks, reference.quantize(hidden, (128, 128)))
    close(activation, reference.swiglu(hidden, weights))
    close(tokens, reference.swiglu_transposed(kept, None))


def test_what_cannot_be_quantised_is_refused():
    x = hard("normal", 8, 256)
    with pytest.raises(ValueError, match="cast them to bfloat16 or float32"):
        quantize.quantize(x.astype(np.int32))
    with pytest.raises(ValueError, match="at least one of each"):
        quantize.quantize(x, (0, 128))
    with pytest.raises(ValueError, match="give as many"):
        quantize.swiglu(x, np.ones(7, np.float32))
    with pytest.raises(ValueError, match="gate columns"):
        quantize.swiglu_transposed(x[:, :255], None)
    with pytest.raises(ValueError, match="one number for each"):
        quantize.swiglu_backward(x, None, x)
    with pytest.raises(ValueError, match="even number"):
        quantize.pack(x[:, :255])
    with pytest.raises(ValueError, match="make them with `pack`"):
        quantize.unpack(np.zeros((8, 2, 128), np.uint8), np.ones((8, 2), np.float32))


def abstract(rows, columns, weighted):
    """An activation's arguments, before it is computed and as they are kept."""
    weights = harness.shape(rows, dtype=jnp.float32) if weighted else None
    hidden = harness.shape(rows, 2 * columns), harness.scaled_shape(rows, 2 * columns, tile=(1, 128))
    return [(h, weights) for h in hidden]


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("case", cases.DISTINCT, ids=str)
@harness.needs_libtpu
def test_the_tpu_kernels_compile_at_full_size(case, chip):
    x = harness.shape(*case)
    harness.compile_for(chip, tpu.quantize, x)
    harness.compile_for(chip, tpu.blocks, x)
    harness.compile_for(chip, tpu.transposed, x)
    harness.compile_for(chip, tpu.transposed, harness.scaled_shape(*case, tile=(1, 128)))


@pytest.mark.parametrize("chip", harness.CHIPS)
@harness.needs_libtpu
def test_the_tpu_kernels_pack_and_unpack_in_one_pass(chip):
    x = harness.shape(cases.TOKENS, 16384)
    for f, arguments in ((quantize.pack, (x,)), (quantize.unpack, jax.eval_shape(quantize.pack, x))):
        results = jax.eval_shape(f, *arguments)
        least = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((arguments, results)))
        program = harness.compile_for(chip, f, *arguments)
        assert program.memory_analysis().temp_size_in_bytes < least / 100
        assert program.as_text().count("tpu_custom_call") == 1


@pytest.mark.parametrize("chip", harness.CHIPS)
@pytest.mark.parametrize("case", cases.ACTIVATIONS, ids=str)
@harness.needs_libtpu
def test_the_fused_tpu_kernels_compile_at_full_size(case, chip):
    hidden, kept = abstract(*case)
    harness.compile_for(chip, tpu.swiglu, *hidden)
    harness.compile_for(chip, tpu.swiglu_transposed, *kept)
    harness.compile_for(chip, tpu.swiglu_backward, *kept, harness.shape(*case[:2]))


@pytest.mark.parametrize("case", cases.MATRICES, ids=str)
@needs_cuda_plugin
def test_hopper_compiles_the_kernels_without_spills(case):
    x = harness.shape(*case)
    assert_fits(compile_kernels(gpu.quantize, x))
    assert_fits(compile_kernels(lambda x: gpu.quantize(x, power_of_two), x))
    assert_fits(compile_kernels(gpu.blocks, x))
    assert_fits(compile_kernels(gpu.transposed, x))
    assert_fits(compile_kernels(gpu.transposed, harness.scaled_shape(*case, tile=(1, 128))))


@needs_cuda_plugin
def test_hopper_compiles_packing_and_unpacking_without_spills():
    x = harness.shape(cases.TOKENS, 16384)
    assert_fits(compile_kernels(quantize.pack, x))
    assert_fits(compile_kernels(quantize.unpack, *jax.eval_shape(quantize.pack, x)))


@pytest.mark.parametrize("case", cases.ACTIVATIONS, ids=str)
@needs_cuda_plugin
def test_hopper_compiles_the_fused_kernels_without_spills(case):
    hidden, kept = abstract(*case)
    assert_fits(compile_kernels(gpu.swiglu, *hidden))
    assert_fits(compile_kernels(gpu.swiglu_transposed, *kept))
    assert_fits(compile_kernels(gpu.swiglu_backward, *kept, harness.shape(*case[:2])))
