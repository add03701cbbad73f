"""Causal attention inside documents, by its definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H V"]:
    """Softmax attention in FP32 over earlier positions of the same segment.

    Scores are materialised: B * H * S * S numbers of FP32.
    """
    scores = jnp.einsum("bqhx,bkhx->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    earlier = jnp.tri(q.shape[1], dtype=bool)[None]
    visible = earlier & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhv->bqhv", weights.astype(v.dtype), v)
