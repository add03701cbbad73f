"""Which token comes next: the likeliest, or one drawn from what temperature, top-k and top-p leave.

The noise of a draw depends on the seed of a sequence and the position in it, and on nothing else. So a
sequence is the same whatever stands beside it in a batch, and however many tokens a step looks at: a draft
is kept where it is the very token that would have been drawn, and the text is that of plain sampling.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32


class Sampling(struct.PyTreeNode):
    """How each sequence draws its tokens."""

    temperature: Float[Array, " B"]  # 0 takes the likeliest
    top_k: Int[Array, " B"]  # tokens to draw from; 0 for all
    top_p: Float[Array, " B"]  # the likeliest that together have this probability, one at least; 1 for all
    seed: UInt32[Array, " B"]


def sample(
    logits: Float[Array, "B S W"], sampling: Sampling, positions: Int[Array, "B S"]
) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """The tokens at these positions of their sequences, and their log-probabilities without temperature."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = sampling.temperature > 0
    drawn = jax.lax.cond(jnp.any(warm), lambda: _drawn(logits, sampling, positions), lambda: likeliest)
    tokens = jnp.where(warm[:, None], drawn, likeliest)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _drawn(logits: Array, sampling: Sampling, positions: Array) -> Int[Array, "B S"]:
    """By the Gumbel trick among the tokens that are left, which are first in the order of probability."""
    vocabulary = logits.shape[-1]
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None, None]
    order = jnp.argsort(-scaled, axis=-1)
    scores = jnp.take_along_axis(scaled, order, axis=-1)
    odds = jax.nn.softmax(scores, axis=-1)
    above = jnp.cumsum(odds, axis=-1) - odds
    most = jnp.where(sampling.top_k > 0, sampling.top_k, vocabulary)[:, None, None]
    left = (above < sampling.top_p[:, None, None]) & (jnp.arange(vocabulary)[None, None] < most)
    left |= jnp.arange(vocabulary)[None, None] == 0

    def noise(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position)
        return jax.random.gumbel(key, (vocabulary,), jnp.float32)

    g = jax.vmap(jax.vmap(noise, (None, 0)))(sampling.seed, positions)
    best = jnp.argmax(jnp.where(left, scores + jnp.take_along_axis(g, order, axis=-1), -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, best[..., None], axis=-1)[..., 0].astype(jnp.int32)
