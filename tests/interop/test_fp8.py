"""FP8 block scales against a definition in float64, written without sharing a line with the code."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.interop import fp8

shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))
seeds = st.integers(0, 2**31)


def scale_of(matrix, rounding):
    """One scale per block by slicing, in the arithmetic that DeepGEMM states: FP32, amax at least 1e-4."""
    rows, columns = (math.ceil(n / 128) for n in matrix.shape)
    out = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            block = matrix[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            amax = np.float32(max(np.abs(block).max(), np.float32(1e-4)))
            out[i, j] = rounding(amax / np.float32(448))
    return out


def spread(scale, shape):
    return np.kron(scale, np.ones((128, 128), scale.dtype))[: shape[0], : shape[1]]


def power_of_two(x):
    mantissa, exponent = math.frexp(float(x))
    return np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


@settings(max_examples=25, deadline=None)
@given(shapes, seeds)
def test_dequantisation_is_value_times_scale_also_in_partial_blocks(shape, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 100, shape).clip(-448, 448).astype(fp8.E4M3)
    scale = rng.uniform(1e-4, 1.0, [math.ceil(n / 128) for n in shape]).astype(np.float32)
    exact = values.astype(np.float64) * spread(scale, shape).astype(np.float64)
    np.testing.assert_array_equal(fp8.dequantise(values, scale), exact.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(shapes, seeds, st.sampled_from([(fp8.as_it_is, lambda x: x), (fp8.to_power_of_two, power_of_two)]))
def test_quantisation_is_that_of_deepgemm_also_in_partial_blocks(shape, seed, roundings):
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(0, 1, shape) * 10.0 ** rng.uniform(-8, 3)).astype(np.float32)
    ours, theirs = roundings
    values, scale = fp8.quantise(matrix, ours)
    wanted = scale_of(matrix, theirs)
    np.testing.assert_array_equal(scale, wanted)
    inverse = spread(np.float32(1) / wanted, shape)
    np.testing.assert_array_equal(values.view(np.uint8), (matrix * inverse).astype(fp8.E4M3).view(np.uint8))


@settings(max_examples=25, deadline=None)
@given(shapes, seeds)
def test_a_round_trip_errs_by_no_more_than_e4m3_does(shape, seed):
    matrix = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    values, scale = fp8.quantise(matrix, fp8.as_it_is)
    wide = spread(scale, shape)
    # Half a unit of three mantissa bits; half the smallest subnormal, 2^-9, near zero. FP32 rounding besides.
    bound = np.maximum(np.abs(matrix) / 16, wide * 2.0**-10) * (1 + 1e-5)
    assert np.all(np.abs(fp8.dequantise(values, scale) - matrix) <= bound)


def test_a_block_of_zeros_has_a_usable_scale():
    values, scale = fp8.quantise(np.zeros((130, 5), np.float32), fp8.as_it_is)
    assert fp8.usable(scale) and not values.astype(np.float32).any()


@pytest.mark.parametrize("power", [-126, -20, 0, 7, 100])
def test_powers_of_two_are_rounded_to_themselves_and_their_successors_up(power):
    exact = np.array([2.0**power], np.float32)
    assert fp8.to_power_of_two(exact) == exact
    assert fp8.to_power_of_two(np.nextafter(exact, np.float32(np.inf))) == 2 * exact


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_no_quantisation_makes_is_not_usable(bad):
    assert not fp8.usable(np.array([1.0, bad], np.float32))


def test_ue8m0_values_are_the_powers_of_two_they_stand_for():
    stored = np.array([0, 100, 127, 254], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert stored.astype(np.float64).tolist() == [2.0**-127, 2.0**-27, 1.0, 2.0**127]
