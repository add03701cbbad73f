"""Routing and balancing are what the report and the released code say, by brute force."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import Config
from dsv3_jax.model import balance, moe


def by_hand(scores, bias, groups, top_groups, k):
    """The experts of one token: the best by biased score inside the groups whose two best sum highest."""
    biased = scores + bias
    members = np.split(np.arange(len(scores)), groups)
    quality = [sum(sorted(biased[m])[-2:]) for m in members]
    allowed = np.concatenate([members[g] for g in np.argsort(quality)[-top_groups:]])
    return set(sorted(allowed, key=lambda e: biased[e])[-k:])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(8, 1, 1, 3), (8, 4, 2, 2), (16, 4, 2, 4), (12, 3, 1, 4)]),
    st.sampled_from([0.0, -3.0]),
)
def test_selection_equals_brute_force_also_with_negative_scores(seed, sizes, shift):
    experts, groups, top_groups, k = sizes
    c = dataclasses.replace(Config(), experts=experts, groups=groups, top_groups=top_groups, top_k=k)
    rng = np.random.default_rng(seed)
    scores = rng.random((2, 5, experts)).astype(np.float32)
    bias = (rng.normal(size=experts) + shift).astype(np.float32)
    chosen = np.asarray(moe.select(jnp.asarray(scores), jnp.asarray(bias), c))
    for got, row in zip(chosen.reshape(-1, k), scores.reshape(-1, experts), strict=True):
        assert set(got) == by_hand(row, bias, groups, top_groups, k)


def test_the_bias_steers_the_choice_without_a_gradient():
    c = dataclasses.replace(Config(), experts=8, groups=1, top_groups=1, top_k=2)
    scores = jnp.full((1, 1, 8), 0.5).at[0, 0, 3].set(0.4)
    bias = jnp.zeros(8).at[3].set(0.2)
    assert 3 in np.asarray(moe.select(scores, bias, c))
    chosen = lambda b: jnp.sum(jnp.take_along_axis(scores, moe.select(scores, b, c), -1))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(chosen)(bias), 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**31 // 8 - 1), min_size=2, max_size=8))
def test_the_bias_moves_by_the_sign_of_the_exact_error(load):
    mean = Fraction(sum(load), len(load))
    want = [(x < mean) - (x > mean) for x in load]
    got = balance.update_bias(jnp.zeros((1, len(load))), jnp.array([load], jnp.int32), jnp.float32(1.0))
    np.testing.assert_array_equal(got[0], want)


def test_the_sequence_loss_is_equations_17_to_20_of_the_report():
    rng = np.random.default_rng(0)
    batch, length, experts, k = 3, 7, 6, 2
    scores = rng.random((batch, length, experts)).astype(np.float32)
    chosen = np.argsort(rng.random((batch, length, experts)), axis=-1)[..., :k].astype(np.int32)
    real = np.arange(length)[None] < np.array([[7], [4], [1]])
    want = 0.0
    for b in range(batch):
        t = real[b].sum()
        for e in range(experts):
            f = experts / (k * t) * sum((chosen[b, i] == e).any() for i in range(length) if real[b, i])
            p = sum(scores[b, i, e] / scores[b, i].sum() for i in range(length) if real[b, i]) / t
            want += float(f * p)
    got = balance.sequence_loss(jnp.asarray(scores), jnp.asarray(chosen), jnp.asarray(real))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_violation_and_entropy_of_known_loads():
    load = jnp.array([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 4, 4]], jnp.int32)
    np.testing.assert_allclose(balance.max_violation(load), [0, 3, 0.5], atol=1e-6)
    np.testing.assert_allclose(balance.load_entropy(load)[:2], [1, 0], atol=1e-6)
