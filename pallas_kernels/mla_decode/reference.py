"""The definition of attention over cached latents. Every other file in this folder must agree with it.

It holds the scores of every query and token in FP32, beside a copy of the cache.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

LOWEST = float(jnp.finfo(jnp.float32).min)  # where a maximum starts: unlike -inf, less itself it is 0


def decode(
    q: Float[Array, "B Q H W"],
    cache: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """Softmax over the tokens that a query sees, in FP32; the first `width` numbers of a token are its value.

    Query t sees the first lengths - (Q - 1 - t) tokens.
    """
    (_, queries, _, _), tokens = q.shape, cache.shape[1]
    position = jnp.arange(tokens)
    ends = lengths[:, None] - jnp.arange(queries)[None, ::-1]
    visible = position[None, None, None] < ends[:, :, None, None]
    filled = position[None, :, None] < lengths[:, None, None]
    held = jnp.where(filled, cache, jnp.zeros((), cache.dtype)).astype(jnp.float32)
    scores = jnp.einsum("bqhx,bsx->bqhs", q.astype(jnp.float32), held, precision="highest") * scale
    scores = jnp.where(visible, scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, initial=LOWEST)
    weights = jnp.exp(scores - highest[..., None])
    z = jnp.sum(weights, axis=-1)
    y = jnp.einsum("bqhs,bsc->bqhc", weights, held[..., :width], precision="highest")
    return (y / jnp.where(z == 0, 1, z)[..., None]).astype(q.dtype), highest + jnp.log(z)


def decode_paged(
    q: Float[Array, "B Q H W"],
    pages: Float[Array, "P page W"],
    table: Int32[Array, "B most"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """`decode` of the cache that the pages of each row of the table make up."""
    used = jnp.arange(table.shape[1])[None] * pages.shape[1] < lengths[:, None]
    cache = pages[jnp.where(used, table, 0)]
    return decode(q, cache.reshape(q.shape[0], -1, cache.shape[3]), lengths, scale, width=width)


def merge(
    y: Float[Array, "N B Q H C"], log_z: Float32[Array, "N B Q H"]
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """The attention over N disjoint sets of tokens together, from that over each."""
    highest = jnp.max(log_z, axis=0, initial=LOWEST)
    weights = jnp.exp(log_z - highest[None])
    z = jnp.sum(weights, axis=0)
    total = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=0)
    return (total / jnp.where(z == 0, 1, z)[..., None]).astype(y.dtype), highest + jnp.log(z)
