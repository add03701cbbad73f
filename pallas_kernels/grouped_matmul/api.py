"""The grouped product with its gradients, on the platform at hand."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import cpu


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], sizes: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """Multiplies each group of rows by its own matrix, accumulating in FP32.

    Args:
        x: rows sorted by group; those past the sum of `sizes` belong to none.
        w: one matrix a group, of the type of `x`.
        sizes: rows of each group, zero allowed; data, not shape. Their sum must not exceed M.

    Returns:
        The products in the type of `x`; rows that belong to no group are undefined but finite where `x` is.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    if x.shape[1] != w.shape[1] or sizes.shape[0] != w.shape[0]:
        raise ValueError(
            f"Rows of width {x.shape[1]} and {sizes.shape[0]} group sizes do not fit matrices {w.shape}: "
            "the width must be their second size and there must be one group size a matrix."
        )
    if x.dtype != w.dtype:
        raise ValueError(f"Rows are {x.dtype} but matrices are {w.dtype}: cast one to the other.")
    return jax.lax.platform_dependent(x, w, sizes, cpu=cpu.matmul, default=_ragged_dot)


def _forward(x, w, sizes):
    return grouped_matmul(x, w, sizes), (x, w, sizes)


def _backward(saved, g):
    x, w, sizes = saved
    dx = grouped_matmul(g, jnp.swapaxes(w, 1, 2), sizes)
    dw = jax.lax.platform_dependent(x, g, sizes, cpu=cpu.weight_gradient, default=_ragged_weight_gradient)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_dot(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _ragged_weight_gradient(x, g, sizes):
    contract_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    product = jax.lax.ragged_dot_general(x, g, sizes, contract_rows, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
