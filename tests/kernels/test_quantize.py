"""Scales and values of quantisation are those that numpy computes, to the last bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quantize
from pallas_kernels.scaled import dequantize, exact, power_of_two
from tests.kernels import harness
from tests.kernels.harness import BF16, hard, numbers

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
