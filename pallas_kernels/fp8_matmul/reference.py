"""The definition of a scaled product. Every other file in this folder must agree with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.scaled import Scaled, dequantize


def matmul(
    x: Scaled, w: Scaled, into: Float32[Array, "M N"] | None = None, dtype=jnp.bfloat16
) -> Float[Array, "M N"]:
    """x [M, K] times w [N, K] transposed: each number is its FP8 value times its scale, sums are FP32.

    A kernel that sums K in pieces and multiplies each piece by its scales differs by the rounding of FP32
    alone.
    """
    product = jnp.dot(dequantize(x), dequantize(w).T, precision="highest")
    return (product if into is None else into + product).astype(dtype)
