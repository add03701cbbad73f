"""The definition of a grouped product: every row times the matrix of its group."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """Rows of group g are the `sizes[g]` rows after those of the groups before it.

    Rows past the sum of the sizes are zero here; an implementation may leave anything there.
    Accumulates in FP32 and returns the type of `x`. Costs G times what it should: for tests.
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    member = (row < ends[None]) & (row >= (ends - sizes)[None])
    every = jnp.einsum("mk,gkn->gmn", x, w, preferred_element_type=jnp.float32)
    return jnp.einsum("gmn,mg->mn", every, member.astype(jnp.float32)).astype(x.dtype)
