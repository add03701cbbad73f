"""Attention on the platform at hand, and its gradients."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.mla_attention import cpu, gpu, gpu_backward, tpu
from pallas_kernels.support import on_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H V"]:
    """Softmax attention over earlier positions of the same segment, with scores and sums in FP32.

    The positions of a segment are consecutive, as those of a document in a packed row are. What is not finite
    in one document may reach the others of its row, in the same head; it never reaches another row or head.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    return forward(q, k, v, scale, segments)[0]


def forward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H V"], Float32[Array, "B H S"]]:
    """The values of `attention`, and the logarithm of each query's sum of exponentials of scaled scores.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check(q, k, v, segments)
    scaled = functools.partial(functools.partial, scale=scale)
    return on_platform(
        *(q, k, v, segments),
        default=scaled(_forward_with, cpu.forward),
        tpu=scaled(_forward_with, tpu.forward),
        hopper=scaled(_forward_with, gpu.forward) if gpu.serves(q, v) else None,
    )


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
    """The cotangents of q, k and v, in their types, from that of y.

    Args:
        y: what `forward` gave, or what is left of it after it was stored in fewer bits: only the product of
            y and g of each query is used.
        log_z: as `forward` gave it.
        g: the cotangent of y, in the type of v.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check(q, k, v, segments)
    batch, length, heads, _ = q.shape
    if y.shape != v.shape or g.shape != v.shape or log_z.shape != (batch, heads, length):
        raise ValueError(
            f"An output {y.shape}, its cotangent {g.shape} and logarithms {log_z.shape} do not fit values "
            f"{v.shape}: the first two need that shape and the logarithms {(batch, heads, length)}, as "
            f"`forward` gives them."
        )
    if g.dtype != v.dtype:
        raise ValueError(f"A cotangent in {g.dtype} does not fit values in {v.dtype}: cast it to their type.")
    scaled = functools.partial(functools.partial, scale=scale)
    return on_platform(
        *(q, k, v, segments, y, log_z, g),
        default=scaled(_backward_with, cpu.backward),
        tpu=scaled(_backward_with, tpu.backward),
        hopper=scaled(_backward_with, gpu_backward.backward) if gpu.serves(q, v) else None,
    )


def _check(q: Array, k: Array, v: Array, segments: Array) -> None:
    if q.shape != k.shape or q.shape[:3] != v.shape[:3] or q.shape[:2] != segments.shape:
        raise ValueError(
            f"Queries {q.shape}, keys {k.shape}, values {v.shape} and segments {segments.shape} do not fit: "
            "queries and keys need one shape, values may differ from it in their width alone, and segments "
            "are [B, S]."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"Queries, keys and values in {q.dtype}, {k.dtype} and {v.dtype} are not served: cast all three "
            "to bfloat16 or all three to float32."
        )


def _forward_with(implementation, q, k, v, segments, *, scale):
    return implementation(q, k, v, scale, segments)


def _backward_with(implementation, q, k, v, segments, *given, scale):
    return implementation(q, k, v, scale, segments, *given)


def _save(q, k, v, scale, segments):
    y, log_z = forward(q, k, v, scale, segments)
    return y, (q, k, v, segments, y, log_z)


def _restore(scale, saved, g):
    q, k, v, segments, y, log_z = saved
    return *backward(q, k, v, scale, segments, y, log_z, g), None


attention.defvjp(_save, _restore)
