"""The definitions of grouped products: every row times the matrix of its group, and sums over a group's rows.

Rows are sorted by group. Group g starts at the sum, over the groups before it, of their sizes rounded up to a
multiple of `alignment`. Rows between the last of a group and the start of the next belong to none, as do
those past the last group: they are padding, and results there are undefined. Sums over rows, which gradients
of weights are, may include padding up to the next start: it must be zero in both operands.

Each of these costs as many times what it should as there are groups: for tests.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.scaled import Scaled, dequantize


def padded(sizes: Int[Array, " G"], alignment: int) -> Int[Array, " G"]:
    """Rows from the start of each group to that of the next."""
    return -(-sizes // alignment) * alignment


def starts(sizes: Int[Array, " G"], alignment: int) -> Int[Array, " G"]:
    """The first row of each group."""
    return jnp.cumsum(padded(sizes, alignment)) - padded(sizes, alignment)


def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], sizes: Int[Array, " G"], alignment: int = 1
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, with FP32 sums, in the type of `x`; padding gives zeros."""
    every = jnp.einsum("mk,gkn->gmn", x, w, precision="highest", preferred_element_type=jnp.float32)
    mine = _members(sizes, alignment, x.shape[0])
    return jnp.sum(jnp.where(mine.T[..., None], every, 0), axis=0).astype(x.dtype)


def weight_gradient(
    x: Float[Array, "M K"], g: Float[Array, "M N"], sizes: Int[Array, " G"], alignment: int = 1
) -> Float[Array, "G K N"]:
    """The sum over each group's rows of the outer products of `x` and `g`; zeros for an empty group."""
    mine = jnp.where(_members(sizes, alignment, x.shape[0]).T[..., None], x, jnp.zeros((), x.dtype))
    theirs = jnp.where(
        jnp.any(_members(sizes, alignment, x.shape[0]), axis=1)[:, None], g, jnp.zeros((), g.dtype)
    )
    return jnp.einsum(
        "gmk,mn->gkn", mine, theirs, precision="highest", preferred_element_type=jnp.float32
    ).astype(x.dtype)


def fp8_matmul(
    x: Scaled, w: Scaled, sizes: Int[Array, " G"], alignment: int = 1, dtype=jnp.bfloat16
) -> Float[Array, "M N"]:
    """Each row of x [M, K] times the transposed matrix of its group, w[g] [N, K], as FP32 numbers with FP32
    sums.

    A kernel that sums K in pieces and multiplies each piece by its scales differs by the rounding of FP32
    alone.
    """
    return matmul(dequantize(x), dequantize(w).mT, sizes, alignment).astype(dtype)


def fp8_weight_gradient(
    x: Scaled,
    y: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = 128,
    into: Float32[Array, "G I O"] | None = None,
) -> Float32[Array, "G I O"]:
    """x [I, M] times y [O, M] transposed over the columns of each group, in FP32, added to `into`."""
    product = weight_gradient(dequantize(x).mT, dequantize(y).mT, sizes, alignment)
    return product if into is None else into + product


def _members(sizes: Int[Array, " G"], alignment: int, rows: int) -> Bool[Array, "M G"]:
    first = starts(sizes, alignment)
    row = jnp.arange(rows)[:, None]
    return (row >= first[None]) & (row < (first + sizes)[None])
