"""Blockwise attention is attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import attention


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
    got = attention.causal_attention(q, k, v, 0.3, segments)
    np.testing.assert_allclose(
        got, definition(q, k, v, 0.3, segments), atol=2e-6
    )  # FP32 sums of <= 300 terms


def test_gradients_equal_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    q, k, v, segments = inputs(50, seed=1)
    weight = np.random.default_rng(2).normal(size=v.shape).astype(np.float32)

    def plain(q, k, v):
        scores = jnp.einsum("bqhx,bkhx->bhqk", q, k) * 0.3
        visible = jnp.tri(50, dtype=bool)[None] & (segments[:, :, None] == segments[:, None, :])
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.sum(weight * jnp.einsum("bhqk,bkhv->bqhv", weights, v))

    blockwise = lambda q, k, v: jnp.sum(weight * attention.causal_attention(q, k, v, 0.3, segments))  # noqa: E731
    for got, want in zip(
        jax.grad(blockwise, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_position_does_not_see_later_ones_nor_other_segments():
    q, k, v, segments = inputs(200)
    before = attention.causal_attention(q, k, v, 0.3, segments)
    position, row = 150, 0
    hidden = (np.arange(200) > position) | (segments[row] != segments[row, position])
    v[row, hidden] = 1e3
    k[row, hidden] = 1e3
    after = attention.causal_attention(q, k, v, 0.3, segments)
    np.testing.assert_array_equal(before[row, position], after[row, position])


def test_no_array_of_all_scores_exists():
    length = 2048
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    loss = lambda q, k, v: jnp.sum(attention.causal_attention(q, k, v, 1.0, jnp.ones((1, length), jnp.int32)))  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    assert f"{length}x{length}" not in text


def test_a_scan_over_layers_keeps_no_masks_of_all_positions():
    layers, length = 3, 512
    segments = jnp.ones((1, length), jnp.int32)

    def run(x, gains):
        layer = lambda x, gain: (attention.causal_attention(x * gain, x, x, 1.0, segments), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, x, gains)[0])

    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    text = jax.jit(jax.grad(run)).lower(x, jax.ShapeDtypeStruct((layers,), jnp.float32)).as_text()
    stored = [size for size in re.findall(r"tensor<([\dx]+)xi1>", text) if size.count("x") > 1]
    assert not stored, stored
