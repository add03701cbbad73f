"""Keeping experts equally busy: the bias rule, the sequence-wise loss, and how uneven a load is."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Balance(NamedTuple):
    """How often each expert of a layer was chosen, and the sequence-wise loss summed over sequences."""

    load: Int[Array, "*l E"]
    loss: Float[Array, "*l"]


def update_bias(
    bias: Float[Array, "L E"], load: Int[Array, "L E"], speed: Float[Array, ""]
) -> Float[Array, "L E"]:
    """Raises the bias of experts below the mean load by `speed` and lowers that of those above.

    `load` counts the whole batch of a step, over micro-batches and devices (arXiv:2408.15664, algorithm 1).
    The comparison is made in integers, so that it does not depend on how the counts were summed.
    """
    experts, total = load.shape[-1], jnp.sum(load, axis=-1, keepdims=True)
    # load against total / experts without rounding, nor products that may pass 2^31: the mean lies in
    # [quotient, quotient + 1), on its lower end only if nothing remains.
    quotient, rest = total // experts, total % experts
    below = (load < quotient) | ((load == quotient) & (rest > 0))
    above = load > quotient
    return bias + speed * (below.astype(bias.dtype) - above.astype(bias.dtype))


def sequence_loss(
    scores: Float[Array, "B S E"],
    chosen: Int[Array, "B S K"],
    real: Bool[Array, "B S"],
    total: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """sum_i f_i P_i of each sequence, summed over sequences (arXiv:2412.19437, equations 17-20).

    f_i counts the experts really chosen. As printed it would count the top K without bias and groups; the
    kernel in DeepSeek's published trace takes expert indices, which are the real choice.

    Args:
        scores: of the positions of each sequence that are here.
        chosen: at these.
        real: which of these count.
        total: from sums over these to sums over the sequence.
    """
    experts, k = scores.shape[-1], chosen.shape[-1]
    length = jnp.maximum(total(jnp.sum(real, axis=1)), 1)
    hits = jax.nn.one_hot(chosen, experts, dtype=scores.dtype) * real[:, :, None, None]
    f = total(jnp.sum(hits, axis=(1, 2))) * (experts / k) / length[:, None]
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    p = total(jnp.sum(share * real[:, :, None], axis=1)) / length[:, None]
    return jnp.sum(jax.lax.stop_gradient(f) * p)


def max_violation(load: Int[Array, "L E"]) -> Float[Array, " L"]:
    """(largest load - mean) / mean of each layer (arXiv:2408.15664, section 4.1)."""
    mean = jnp.mean(load.astype(jnp.float32), axis=-1)
    return jnp.max(load, axis=-1) / jnp.maximum(mean, 1e-20) - 1.0


def load_entropy(load: Int[Array, "L E"]) -> Float[Array, " L"]:
    """Entropy of each layer's load as a share of its maximum: 1 when all experts are equally busy."""
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    return -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20)), axis=-1) / jnp.log(
        jnp.float32(load.shape[-1])
    )
