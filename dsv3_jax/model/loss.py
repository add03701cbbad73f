"""Next-token cross-entropy through the output head, without keeping logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import mesh

CHUNK = 2048  # tokens whose logits exist at once: 1 GB in FP32 for 129,280 words


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D W"],
    targets: Int[Array, "B S"],
    valid: Bool[Array, "B S"],
) -> Float[Array, ""]:
    """The sum of -log p(target) over valid positions, in nats.

    Logits are FP32 products of the head's precision and live for one chunk of tokens. Where a gradient is
    asked for it is made in the same pass, so that no chunk is computed twice.
    """
    return -jnp.sum(jnp.where(valid, scores(hidden, head, targets).logprobs, 0.0))


class Scores(NamedTuple):
    """What a model says of the token after each position."""

    logprobs: Float[Array, "*m B S"]  # log p of that token, nats in FP32
    likeliest: Int[Array, "*m B S"]  # the token that is most probable; the first of equals


def scores(hidden: Float[Array, "B S D"], head: Float[Array, "D W"], targets: Int[Array, "B S"]) -> Scores:
    """log p(target) at every position, and the token that has the most."""

    def chunk(_, inputs):
        h, target = inputs
        logits = jnp.dot(h, head, preferred_element_type=jnp.float32)
        logprobs = _pick(logits, target) - jax.nn.logsumexp(logits, axis=-1)
        return None, Scores(logprobs, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    _, out = jax.lax.scan(chunk, None, (_chunks(hidden), _chunks(targets)))
    return jax.tree.map(lambda x: x.reshape(-1)[: targets.size].reshape(targets.shape), out)


def _forward(hidden, head, targets, valid):
    def chunk(carry, inputs):
        loss, dhead = carry
        h, target, counts = inputs
        logits = jnp.dot(h, head, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        loss += jnp.sum(jnp.where(counts, log_z[:, 0] - _pick(logits, target), 0.0))
        error = jnp.exp(logits - log_z) - jax.nn.one_hot(target, head.shape[1])
        error = jnp.where(counts[:, None], error, 0.0).astype(h.dtype)
        dh = jnp.dot(error, head.T, preferred_element_type=jnp.float32).astype(h.dtype)
        dhead += jnp.dot(h.T, error, preferred_element_type=jnp.float32)
        return (loss, dhead), dh

    zero = mesh.vary_like((jnp.zeros(()), jnp.zeros(head.shape, jnp.float32)), hidden, head)
    (loss, dhead), dh = jax.lax.scan(chunk, zero, (_chunks(hidden), _chunks(targets), _chunks(valid)))
    dh = dh.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    return loss, (dh, dhead.astype(head.dtype))


def _backward(saved, g):
    dh, dhead = saved
    return (g * dh).astype(dh.dtype), (g * dhead).astype(dhead.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _pick(logits: Float[Array, "T W"], target: Int[Array, " T"]) -> Float[Array, " T"]:
    return jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]


def _chunks(x: Array) -> Array:
    """[B, S, ...] as [chunks, tokens of a chunk, ...], padded with zeros, which count as not valid."""
    flat = x.reshape(-1, *x.shape[2:])
    size = min(CHUNK, flat.shape[0])
    padding = -flat.shape[0] % size
    return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(-1, size, *flat.shape[1:])
