"""Rotary positions are complex rotations, and YaRN's numbers are the released ones."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, Yarn
from dsv3_jax.model import rope


def test_pairs_turn_like_complex_numbers(c):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, c.d_rope)).astype(np.float32)
    got = rope.rotate(jnp.asarray(x), jnp.arange(9)[None], c)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.arange(9)[:, None] * rope.frequencies(c))[
        None, :, None
    ]
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-6)


def test_yarn_keeps_fast_pairs_and_slows_the_others_forty_times():
    plain, stretched = (
        rope.frequencies(Config()),
        rope.frequencies(dataclasses.replace(Config(), yarn=Yarn())),
    )
    np.testing.assert_array_equal(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-12)
    assert np.all(np.diff(stretched[10:24] / plain[10:24]) < 0)


def test_the_softmax_scale_with_and_without_yarn():
    assert Config().softmax_scale == pytest.approx(0.0721688, rel=1e-6)
    extended = dataclasses.replace(Config(), yarn=Yarn())
    assert extended.softmax_scale == pytest.approx(0.1352338, rel=1e-6)
    assert extended.rope_magnitude == 1.0


def test_equal_betas_make_a_step_not_a_division_by_zero():
    c = dataclasses.replace(Config(), yarn=Yarn(beta_fast=1.0, beta_slow=1.0, factor=32.0))
    assert np.isfinite(rope.frequencies(c)).all()
