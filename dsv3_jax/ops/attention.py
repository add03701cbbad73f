"""Causal attention inside documents, block by block, so that no S x S array of scores ever exists.

Softmax statistics are kept instead of probabilities and the backward pass computes these again
(arXiv:2205.14135). A block of queries meets only the keys up to its own end, which skips nearly half of the
square; sequences run one after another, so that a block's scores stay in cache.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # queries; of 64, 128 and 256 the fastest at S=512, H=8 on two CPU cores
MOST_BLOCKS = 16  # the program has one piece a block, so long sequences take larger blocks


def causal_attention(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H V"]:
    """Softmax attention over earlier positions of the same segment, with scores and sums in FP32."""
    return _blockwise(q, k, v, scale, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise(q: Array, k: Array, v: Array, scale: float, segments: Array) -> Array:
    return _each_sequence(functools.partial(_forward, scale), q, k, v, segments)[0]


def _save(q, k, v, scale, segments):
    y, log_z = _each_sequence(functools.partial(_forward, scale), q, k, v, segments)
    return y, (q, k, v, segments, y, log_z)


def _restore(scale, saved, g):
    return *_each_sequence(functools.partial(_backward, scale), *saved, g), None


_blockwise.defvjp(_save, _restore)


def _each_sequence(f: Callable, *inputs: Array):
    return jax.lax.map(lambda one: f(*one), inputs)


def _forward(
    scale: float,
    q: Float[Array, "S H X"],
    k: Float[Array, "S H X"],
    v: Float[Array, "S H V"],
    segments: Array,
) -> tuple[Float[Array, "S H V"], Float[Array, "H S"]]:
    """The output, and the logarithm of each query's sum of exponentials."""
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    outputs, logs = [], []
    for start, end in _blocks(q.shape[1]):
        scores = _scores(q[:, start:end], k[:, :end], scale)
        scores = jnp.where(_visible(segments, start, end)[None], scores, -jnp.inf)
        highest = jnp.max(scores, axis=-1, keepdims=True)  # finite: a query always sees itself
        weights = jnp.exp(scores - highest)
        z = jnp.sum(weights, axis=-1, keepdims=True)
        y = jnp.einsum(
            "hqk,hkv->hqv", weights.astype(v.dtype), v[:, :end], preferred_element_type=jnp.float32
        )
        outputs.append((y / z).astype(v.dtype))
        logs.append((highest + jnp.log(z))[..., 0])
    return jnp.swapaxes(jnp.concatenate(outputs, axis=1), 0, 1), jnp.concatenate(logs, axis=1)


def _backward(scale, q, k, v, segments, y, log_z, g) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v of one sequence."""
    q, k, v, y, g = (jnp.swapaxes(x, 0, 1) for x in (q, k, v, y, g))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner = jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32), axis=-1, keepdims=True)
    dq = []
    dk, dv = jnp.zeros_like(k, dtype=jnp.float32), jnp.zeros_like(v, dtype=jnp.float32)
    for start, end in _blocks(q.shape[1]):
        queries, cotangents = q[:, start:end], g[:, start:end]
        weights = jnp.exp(_scores(queries, k[:, :end], scale) - log_z[:, start:end, None])
        weights = jnp.where(_visible(segments, start, end)[None], weights, 0.0)
        dweights = product("hqv,hkv->hqk", cotangents, v[:, :end])
        dscores = (weights * (dweights - inner[:, start:end]) * scale).astype(q.dtype)
        dq.append(product("hqk,hkx->hqx", dscores, k[:, :end]))
        dk = dk.at[:, :end].add(product("hqk,hqx->hkx", dscores, queries))
        dv = dv.at[:, :end].add(product("hqk,hqv->hkv", weights.astype(g.dtype), cotangents))
    out = (jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
    return tuple(jnp.swapaxes(x, 0, 1) for x in out)  # pyright: ignore[reportReturnType]


def _scores(q: Float[Array, "H q X"], k: Float[Array, "H k X"], scale: float) -> Float[Array, "H q k"]:
    return jnp.einsum("hqx,hkx->hqk", q, k, preferred_element_type=jnp.float32) * scale


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and ends."""
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _visible(segments: Int[Array, " S"], start: int, end: int) -> Bool[Array, "q k"]:
    """Which keys up to `end` the queries from `start` on may see."""
    earlier = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    return earlier & (segments[start:end, None] == segments[None, :end])
