"""Every implementation of the grouped product is the product of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import api, cpu, grouped_matmul, reference

IMPLEMENTATIONS = pytest.mark.parametrize("matmul", [grouped_matmul, cpu.matmul, api._ragged_dot])
WEIGHT_GRADIENTS = pytest.mark.parametrize("gradient", [cpu.weight_gradient, api._ragged_weight_gradient])


def operands(sizes, width, columns, spare=0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(sizes) + spare, width)).astype(np.float32)
    return x, rng.normal(size=(len(sizes), width, columns)).astype(np.float32), np.array(sizes, np.int32)


def by_hand(x, w, sizes):
    """Each group's rows times its matrix, in float64."""
    ends = np.cumsum(sizes)
    parts = [x[e - n : e].astype(np.float64) @ w[g] for g, (e, n) in enumerate(zip(ends, sizes, strict=True))]
    return np.concatenate(parts)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(1, 9),
)
@IMPLEMENTATIONS
def test_rows_meet_the_matrix_of_their_group(matmul, sizes, spare, width, columns):
    x, w, sizes = operands(sizes, width, columns, spare + (sum(sizes) == 0))
    got = matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes))[: sizes.sum()]
    np.testing.assert_allclose(got, by_hand(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("sizes", [[600, 0, 0], [0, 0, 600], [257, 1, 342]])
@IMPLEMENTATIONS
def test_uneven_groups_longer_than_a_tile(matmul, sizes):
    x, w, sizes = operands(sizes, 16, 24)
    got = matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes))
    np.testing.assert_allclose(got, by_hand(x, w, sizes), atol=2e-5)


@pytest.mark.parametrize("sizes", [[600, 0, 3], [5, 0, 7], [0, 0, 0]])
@WEIGHT_GRADIENTS
def test_weight_gradients_are_sums_over_the_rows_of_the_group(gradient, sizes):
    x, w, sizes = operands(sizes, 16, 24, spare=9)
    g = np.random.default_rng(1).normal(size=(len(x), 24)).astype(np.float32)
    got = gradient(jnp.asarray(x), jnp.asarray(g), jnp.asarray(sizes))
    ends = np.cumsum(sizes)
    want = [x[e - n : e].T.astype(np.float64) @ g[e - n : e] for e, n in zip(ends, sizes, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-4)  # sums of 600 products of unit normals


def test_gradients_equal_those_of_the_definition():
    x, w, sizes = map(jnp.asarray, operands([5, 0, 9], 4, 6, spare=2))
    loss = lambda f: lambda x, w: jnp.sum(jnp.sin(f(x, w, jnp.asarray(sizes))[:14]))  # noqa: E731
    got = jax.grad(loss(grouped_matmul), (0, 1))(x, w)
    want = jax.grad(loss(reference.grouped_matmul), (0, 1))(x, w)
    np.testing.assert_allclose(got[0][:14], want[0][:14], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_nan_stays_in_its_row():
    x, w, sizes = operands([3, 4], 4, 5)
    x[1] = np.nan
    got = np.asarray(grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes)))
    assert np.isnan(got[1]).all()
    assert np.isfinite(np.delete(got, 1, axis=0)).all()


def test_shapes_that_do_not_fit_are_refused():
    x, w, sizes = operands([3, 4], 4, 5)
    with pytest.raises(ValueError, match="Rows of width 3 .* do not fit matrices"):
        grouped_matmul(jnp.asarray(x[:, :3]), jnp.asarray(w), jnp.asarray(sizes))
    with pytest.raises(ValueError, match="cast one to the other"):
        grouped_matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w), jnp.asarray(sizes))
