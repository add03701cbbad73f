"""Causal attention inside documents, block by block, so that no S x S array of scores ever exists.

Softmax statistics are kept instead of probabilities and the backward pass computes these again
(arXiv:2205.14135). A block of queries meets only the keys up to its own end, which skips nearly half of the
square; heads run one after another, so that a block's scores stay in cache. Plain XLA, so it also serves the
platforms and types that the kernels do not.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.mla_attention.reference import first_seen

BLOCK = 128  # queries; of 64, 128 and 256 the fastest at S=1024 and S=2048, H=8 on two CPU cores
MOST_BLOCKS = 16  # the program has one piece a block, so long sequences take larger blocks

_product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def forward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H V"], Float32[Array, "B H S"]]:
    """The values of `reference.forward`, but for the weights, which are rounded to the type of v."""
    batch, length, heads, _ = q.shape
    inputs = (*map(_by_head, (q, k, v)), jnp.repeat(first_seen(segments), heads, axis=0))
    y, log_z = _one_by_one(functools.partial(_forward, scale), *inputs)
    return _from_heads(y, batch), log_z.reshape(batch, heads, length)


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
    """The cotangents of `reference.backward`, but for weights, which are rounded to the inputs' type."""
    batch, length, heads, _ = q.shape
    first = jnp.repeat(first_seen(segments), heads, axis=0)
    saved = (*map(_by_head, (q, k, v)), first, _by_head(y), log_z.reshape(-1, length))
    dq, dk, dv = _one_by_one(functools.partial(_backward, scale), *saved, _by_head(g))
    return _from_heads(dq, batch), _from_heads(dk, batch), _from_heads(dv, batch)


def _by_head(x: Float[Array, "B S H W"]) -> Float[Array, "BH S W"]:
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _from_heads(x: Float[Array, "BH S W"], batch: int) -> Float[Array, "B S H W"]:
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)


def _one_by_one(f: Callable, *inputs: Array):
    return jax.lax.map(lambda one: f(*one), inputs)


def _forward(
    scale: float,
    q: Float[Array, "S X"],
    k: Float[Array, "S X"],
    v: Float[Array, "S V"],
    first: Int[Array, " S"],
) -> tuple[Float[Array, "S V"], Float[Array, " S"]]:
    q, first = _bound(q, first)
    outputs, logs = [], []
    for start, end in _blocks(q.shape[0]):
        scores = _product("qx,kx->qk", q[start:end], k[:end]) * scale
        scores = jnp.where(_visible(first, start, end), scores, -jnp.inf)
        highest = jnp.max(scores, axis=-1, keepdims=True)  # finite: a query always sees itself
        weights = jnp.exp(scores - highest)
        z = jnp.sum(weights, axis=-1, keepdims=True)
        y = _product("qk,kv->qv", weights.astype(v.dtype), v[:end])
        outputs.append((y / z).astype(v.dtype))
        logs.append((highest + jnp.log(z))[:, 0])
    return jnp.concatenate(outputs), jnp.concatenate(logs)


def _backward(scale, q, k, v, first, y, log_z, g) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v; those of k and v are summed over blocks as [width, S].

    In that order their products need no transposed scores, which on a CPU cost more than the product.
    """
    g, first = _bound(g, first)
    inner = jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32), axis=-1, keepdims=True)
    dq = []
    dk, dv = (jnp.zeros_like(x.T, dtype=jnp.float32) for x in (k, v))
    for start, end in _blocks(q.shape[0]):
        queries, cotangents = q[start:end], g[start:end]
        scores = _product("qx,kx->qk", queries, k[:end]) * scale
        weights = jnp.exp(scores - log_z[start:end, None])
        weights = jnp.where(_visible(first, start, end), weights, 0.0)
        dweights = _product("qv,kv->qk", cotangents, v[:end])
        dscores = (weights * (dweights - inner[start:end]) * scale).astype(q.dtype)
        dq.append(_product("qk,kx->qx", dscores, k[:end]))
        # Padded and added: `.at[:, :end].add` crashes the compiler of jax 0.11.2 where devices are several.
        later = ((0, 0), (0, k.shape[0] - end))
        dk += jnp.pad(_product("qk,qx->xk", dscores, queries), later)
        dv += jnp.pad(_product("qk,qv->vk", weights.astype(g.dtype), cotangents), later)
    return jnp.concatenate(dq).astype(q.dtype), dk.T.astype(k.dtype), dv.T.astype(v.dtype)


def _bound(x: Array, first: Array) -> tuple[Array, Array]:
    """Ties what masks are made of to a layer's own values.

    Else JAX, which sees that it is the same in every layer of a scan, would make all masks before the scan
    and keep them: half a square for each head.
    """
    return jax.lax.optimization_barrier((x, first))


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and ends."""
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _visible(first: Int[Array, " S"], start: int, end: int) -> Bool[Array, "q k"]:
    """Which keys up to `end` the queries from `start` on may see; made of two comparisons with each position.

    Comparing the segments of both instead takes twice as long.
    """
    key = jnp.arange(end)[None]
    return (key <= jnp.arange(start, end)[:, None]) & (key >= first[start:end, None])
