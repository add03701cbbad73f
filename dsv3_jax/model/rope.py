"""Rotary positions on interleaved pairs, with YaRN's frequencies (arXiv:2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config, Yarn


def frequencies(c: Config) -> np.ndarray:
    """Radians per position of each of the R/2 pairs, float64."""
    pair = np.arange(0, c.d_rope, 2, dtype=np.float64)
    plain = c.rope_theta ** (-pair / c.d_rope)
    if c.yarn is None:
        return plain
    stretched = _share_stretched(c.yarn, c.d_rope, c.rope_theta)
    return plain * (1 - stretched) + plain / c.yarn.factor * stretched


def rotate(x: Float[Array, "B S H R"], positions: Int[Array, "#B S"], c: Config) -> Float[Array, "B S H R"]:
    """Rotates the pairs (x0, x1), (x2, x3), ... as complex numbers.

    Returns the first elements of all pairs, then the second ones. Queries and keys are permuted alike, so
    scores do not change, and halves are cheaper to write than alternating elements.
    """
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(c), jnp.float32)[None, None]
    cos, sin = (c.rope_magnitude * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))
    wide = x.astype(jnp.float32)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _share_stretched(yarn: Yarn, width: int, theta: float) -> np.ndarray:
    """Which share of each pair's frequency is divided by the factor: 0 for fast pairs, 1 for slow ones."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    # Kimi-K2 sets both betas to 1; where even floor and ceiling meet, the ramp becomes a step.
    ramp = (np.arange(width // 2) - low) / max(high - low, 1e-3)
    return np.clip(ramp, 0.0, 1.0)
