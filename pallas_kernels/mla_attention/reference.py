"""The definition of causal attention inside documents. Every other file in this folder must agree with it.

It holds the scores of every query and key, so it is for short rows: tests, and no more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


def forward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H V"], Float32[Array, "B H S"]]:
    """Softmax over the earlier positions of a query's document and itself; all in FP32, then in the type of
    v.

    Returns:
        The output, and the logarithm of each query's sum of exponentials of scaled scores.
    """
    scores = jnp.where(_visible(segments), _scores(q, k, scale), -jnp.inf)
    y = jnp.einsum("bhqk,bkhv->bqhv", jax.nn.softmax(scores), v.astype(jnp.float32), precision="highest")
    return y.astype(v.dtype), jax.nn.logsumexp(scores, axis=-1)


def backward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    y: Float[Array, "B S H V"],
    log_z: Float32[Array, "B H S"],
    g: Float[Array, "B S H V"],
) -> tuple[Float[Array, "B S H X"], Float[Array, "B S H X"], Float[Array, "B S H V"]]:
    """The cotangents of q, k and v from that of y, which with `log_z` comes from `forward`.

    y is used for one number a query, the product of y and g; it may have been stored in fewer bits.
    """
    wide = g.astype(jnp.float32)
    scores = jnp.where(_visible(segments), _scores(q, k, scale), -jnp.inf)
    weights = jnp.exp(scores - log_z[..., None])
    inner = jnp.einsum("bqhv,bqhv->bhq", y.astype(jnp.float32), wide, precision="highest")
    dweights = jnp.einsum("bqhv,bkhv->bhqk", wide, v.astype(jnp.float32), precision="highest")
    dscores = weights * (dweights - inner[..., None]) * scale
    dq = jnp.einsum("bhqk,bkhx->bqhx", dscores, k.astype(jnp.float32), precision="highest")
    dk = jnp.einsum("bhqk,bqhx->bkhx", dscores, q.astype(jnp.float32), precision="highest")
    dv = jnp.einsum("bhqk,bqhv->bkhv", weights, wide, precision="highest")
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def first_seen(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Where the document of each position starts. A query sees the keys from there to itself."""
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return jax.lax.cummax(jnp.where(starts, jnp.arange(segments.shape[1], dtype=jnp.int32)[None], 0), axis=1)


def _visible(segments: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    position = jnp.arange(segments.shape[1])
    seen = first_seen(segments)[:, :, None] <= position[None, None]
    return (seen & (position[None, None] <= position[None, :, None]))[:, None]


def _scores(q: Array, k: Array, scale: float) -> Float32[Array, "B H S S"]:
    wide = q.astype(jnp.float32), k.astype(jnp.float32)
    return jnp.einsum("bqhx,bkhx->bhqk", *wide, precision="highest") * scale
