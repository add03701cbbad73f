"""Tokens are drawn from the distribution that temperature, top-k and top-p leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.inference.sampling import Sampling, sample

DRAWS = 20_000


def left_by(logits, temperature, top_k, top_p):
    """The definition, one token at a time, in float64."""
    odds = np.exp(np.float64(logits) / temperature)
    odds /= odds.sum()
    order = sorted(range(len(odds)), key=lambda i: (-odds[i], i))
    kept, sum_before = [], 0.0
    for rank, i in enumerate(order):
        if rank and (sum_before >= top_p or (top_k and rank >= top_k)):
            break
        kept.append(i)
        sum_before += odds[i]
    result = np.zeros(len(odds))
    result[kept] = odds[kept] / odds[kept].sum()
    return result


def rows(count, temperature, top_k=0, top_p=1.0):
    full = lambda value, dtype: jnp.full(count, value, dtype)  # noqa: E731
    return Sampling(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        jnp.arange(count, dtype=jnp.uint32),
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.3, 4, 0.6), (1.0, 1, 1.0), (1.0, 0, 0.0)],
)
def test_frequencies_over_seeds_are_those_of_the_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 1.5
    want = left_by(logits, temperature, top_k, top_p)
    everywhere = jnp.broadcast_to(jnp.asarray(logits), (DRAWS, 1, 12))
    tokens, logprobs = jax.jit(sample)(
        everywhere, rows(DRAWS, temperature, top_k, top_p), jnp.full((DRAWS, 1), 5)
    )
    got = np.bincount(np.asarray(tokens)[:, 0], minlength=12) / DRAWS
    assert not np.any(got[want == 0])
    # Five standard deviations of a frequency.
    assert np.all(np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / DRAWS) + 1e-9)
    plain = logits - np.log(np.sum(np.exp(np.float64(logits))))
    np.testing.assert_allclose(np.asarray(logprobs)[:, 0], plain[np.asarray(tokens)[:, 0]], atol=1e-5)


def test_frequencies_over_positions_of_a_sequence_too():
    logits = jnp.asarray(np.log([0.1, 0.2, 0.3, 0.4]), jnp.float32)
    everywhere = jnp.broadcast_to(logits, (1, DRAWS, 4))
    tokens, _ = jax.jit(sample)(everywhere, rows(1, 1.0), jnp.arange(DRAWS)[None])
    got = np.bincount(np.asarray(tokens)[0], minlength=4) / DRAWS
    np.testing.assert_allclose(got, [0.1, 0.2, 0.3, 0.4], atol=5 * 0.5 / np.sqrt(DRAWS))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), position=st.integers(0, 10**6), cold=st.booleans())
def test_a_draw_depends_on_its_seed_and_position_alone(seed, position, cold):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 16)), jnp.float32)
    warm = rows(3, 1.0).replace(seed=jnp.asarray([0, seed, 1], jnp.uint32))
    mixed = warm.replace(temperature=jnp.asarray([0.0 if cold else 1.0, 1.0, 0.0], jnp.float32))
    at = jnp.asarray([[0, 1], [position, position + 1], [7, 8]])
    together, _ = sample(logits, mixed, at)
    one = jax.tree.map(lambda x: x[1:2], warm)
    for n in range(2):
        alone, _ = sample(logits[1:2, n : n + 1], one, at[1:2, n : n + 1])
        assert alone[0, 0] == together[1, n]
    assert together[2, 0] == np.argmax(logits[2, 0])
