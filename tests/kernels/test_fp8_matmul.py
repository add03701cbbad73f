"""A scaled product is the product of the numbers that its operands stand for."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fp8_matmul, quantize
from tests.kernels.harness import difference, hard, numbers, relative_error

FP32_SUMS = 1e-6  # of FP32 rounding at most; about 2^-24 sqrt(K) is seen


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 700), st.sampled_from([(128, 128), (1, 128)]))
def test_products_of_any_shape(m, n, k, tile):
    x, w = quantize.quantize(hard("normal", m, k)), quantize.quantize(hard("edges", n, k), tile)
    got = fp8_matmul.matmul(x, w, dtype=jnp.float32)
    want = numbers(x) @ numbers(w).T
    bound = FP32_SUMS * (np.abs(numbers(x)) @ np.abs(numbers(w)).T)
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound + 1e-30).all()


@pytest.mark.parametrize("name", ["normal", "one huge", "tiny", "edges", "some zero tiles"])
def test_the_product_is_close_to_that_of_what_was_quantised(name):
    x, w = hard(name, 128, 7168), hard("normal", 96, 7168)
    got = fp8_matmul.matmul(quantize.quantize(x), quantize.quantize(w, (128, 128)))
    assert difference(got, x.astype(np.float64) @ w.T.astype(np.float64)) < 1e-3


def test_sums_go_on_from_those_given():
    x, w = quantize.quantize(hard("normal", 40, 300)), quantize.quantize(hard("normal", 50, 300))
    into = hard("normal", 40, 50)
    got = fp8_matmul.matmul(x, w, into, dtype=jnp.float32)
    assert relative_error(got, numbers(x) @ numbers(w).T + into) < FP32_SUMS


def test_nan_reaches_its_row_alone():
    x = quantize.quantize(hard("nan", 8, 256))
    got = np.asarray(fp8_matmul.matmul(x, quantize.quantize(hard("normal", 16, 256))), np.float32)
    assert np.isnan(got[4]).all() and np.isfinite(np.delete(got, 4, 0)).all()


def test_operands_that_do_not_fit_are_refused():
    x, w = quantize.quantize(hard("normal", 8, 256)), quantize.quantize(hard("normal", 8, 200))
    with pytest.raises(ValueError, match="same number of columns"):
        fp8_matmul.matmul(x, w)
    with pytest.raises(ValueError, match="tiles of one row in the first"):
        fp8_matmul.matmul(quantize.quantize(hard("normal", 8, 256), (128, 128)), x)
