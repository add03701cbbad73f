"""The variants of the precision study lose what they say, and nothing else."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import quantize
from pallas_kernels.scaled import exact
from tests.kernels.harness import hard, numbers, relative_error
from tools import fp8_variants as variants

CUT = 2.0**-13  # what one addition of 14 bits loses at most, of the sum


def test_sums_lose_at_most_a_unit_of_14_bits_with_each_addition():
    rng = np.random.default_rng(0)  # positive, so that sums only grow and every loss is downwards
    x, w = (quantize.quantize(jnp.asarray(rng.uniform(0.5, 1, (n, 4096)), jnp.float32)) for n in (40, 50))
    lost = 1 - np.asarray(variants.matmul(x, w, jnp.float32)) / (numbers(x) @ numbers(w).T)
    assert (lost > 0.1 * CUT).all()
    assert (lost < 4096 / 32 * CUT).all()


def test_a_product_of_one_addition_is_cut_once():
    x, w = (quantize.quantize(hard("normal", n, 32)) for n in (40, 50))
    got, want = np.asarray(variants.matmul(x, w, jnp.float32)), numbers(x) @ numbers(w).T
    assert (np.abs(got) <= np.abs(want) + 1e-6).all()
    assert (np.abs(got - want) <= CUT * np.abs(want) + 1e-6).all()
    assert not np.any(got.view(np.int32) & 0x3FF)


def test_rows_of_experts_are_multiplied_as_by_each_experts_own_matrix():
    sizes = jnp.array([100, 0, 129, 3])
    x = quantize.quantize(hard("normal", 700, 96))
    w = quantize.quantize(np.stack([hard("normal", 64, 96) * (i + 1) for i in range(4)]), (128, 128))
    got = variants.grouped_matmul(x, w, sizes)
    for expert, start, size in ((0, 0, 100), (2, 128, 129), (3, 384, 3)):
        want = numbers(x)[start : start + size] @ numbers(w)[expert].T
        assert relative_error(got[start : start + size], want) < 4e-3  # of BF16, and three cuts


def test_gradients_of_experts_are_summed_over_their_own_columns():
    sizes = jnp.array([128, 0, 256])  # of 700 columns, of which the last belong to none
    x, y = (quantize.quantize(hard("normal", n, 700)) for n in (96, 64))
    got = variants.grouped_weight_gradient(x, y, sizes)
    assert not np.asarray(got[1]).any()
    for expert, start, end in ((0, 0, 128), (2, 128, 384)):
        want = numbers(x)[:, start:end] @ numbers(y)[:, start:end].T
        assert relative_error(got[expert], want) < 8 * CUT


def test_gradients_in_blocks_are_the_same_numbers_along_both_axes():
    g = hard("normal", 200, 300) * np.arange(1, 201)[:, None]
    rows, columns = variants.in_blocks(jnp.asarray(g), exact)
    assert rows.tile == columns.tile == (1, 128)
    np.testing.assert_array_equal(numbers(rows), numbers(columns).T)
    assert relative_error(numbers(rows), g) < 0.04
    assert len(np.unique(np.asarray(rows.scales))) == 2 * 3
